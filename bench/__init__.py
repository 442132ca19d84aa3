"""Benchmarks of the public operations."""
