"""Helpers for all parts of the package."""
