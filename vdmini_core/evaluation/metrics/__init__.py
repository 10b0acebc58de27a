"""Measures of quality; one file each."""
