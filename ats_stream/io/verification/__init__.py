"""Verifying that a store is whole: bytes, structure, pixels, and likeness to its source."""
