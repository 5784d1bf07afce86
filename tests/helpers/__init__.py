"""Helpers that test files share. No file here contains a test."""
