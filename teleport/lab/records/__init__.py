"""A run on disk: written, read, checked, compared."""
