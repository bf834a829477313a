"""Benchmarks that time our operations beside torch's in one process: `python -m benchmarks`."""
