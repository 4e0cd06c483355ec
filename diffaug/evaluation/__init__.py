"""Measuring synthetic cases: a reference segmenter, overlap and statistics."""
