"""Benchmarks: meters, a harness that compares candidates in one process, and one module per question."""
