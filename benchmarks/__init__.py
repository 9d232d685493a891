"""Measurements that anyone can run again: `python -m benchmarks --quick`, `python -m benchmarks`, `... --draw`."""
