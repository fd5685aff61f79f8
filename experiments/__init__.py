"""Reproduces the paper's findings, and answers what it left open: `python -m experiments --help`."""
