"""Benchmarks, metrics and statistics."""
