"""Benchmarks, apart from the tests: `python -m jobs.benchmark <subject> [options]` (see __main__.py)."""
