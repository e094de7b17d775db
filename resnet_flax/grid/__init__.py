"""Grids of ordinary runs: which there are, what is left of them to do, doing it."""
