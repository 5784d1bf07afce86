"""Vocabularies on disk, a format at a time."""
