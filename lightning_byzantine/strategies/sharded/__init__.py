"""Models of which each rank holds a part."""
