"""Training at scale: Criteo files, many ranks, restarts. `python -m examples.criteo --help`."""
