"""The second pass of double momentum."""
