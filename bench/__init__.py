"""Benchmarks: ``python -m bench SUITE``. See README.md."""
