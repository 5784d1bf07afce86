"""Helpers that test files share; no file here holds a test."""
