#!/usr/bin/env bash
# Measures this package beside stock Ultralytics in five minutes, and compares the ratios with the committed ones. The exit
# status is 1 if one got worse. It needs a GPU; --device cpu measures the processor instead. --help lists all arguments.
# --update writes the ratios into benchmarks/results/guard.json, to be committed after a change that is meant to be.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
mkdir -p "$work/runs"
exec python -m benchmarks guard --out "$work/runs/guard.json" "$@"
