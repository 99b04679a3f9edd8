"""Measurements: each module here is `python -m experiments bench NAME`, its `main`."""
