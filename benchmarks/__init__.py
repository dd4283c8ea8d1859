"""Side-by-side runs against stock Ultralytics. `python -m benchmarks` lists them."""
