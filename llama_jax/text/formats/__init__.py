"""Formats of vocabularies on disk, one module for each."""
