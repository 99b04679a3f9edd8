"""The commands of `python -m experiments`, one a file, each with its own options and `main`."""
