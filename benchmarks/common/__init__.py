"""Parts that the benchmarks share: processes, the machine, the JSON file, rounds, limits and models."""
