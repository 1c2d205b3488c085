"""Measures this product against plain Ray on the same machine: ``python -m benchmarks``."""
