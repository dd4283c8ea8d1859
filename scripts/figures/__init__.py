"""Figures of the README and of docs/, tied to the JSON files of the benchmarks. `python -m scripts.figures --help`."""
