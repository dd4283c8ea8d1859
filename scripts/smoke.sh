#!/usr/bin/env bash
# Tests the main features on this machine's GPU in a few minutes: attention, training under memory pressure, val, export.
# The attention test needs flash-attn, the TensorRT test needs TensorRT. Training, val and ONNX need only this package.
# Arguments go to pytest, as in scripts/smoke.sh --junitxml=smoke.xml. A test that cannot run here is skipped and listed.
# YOLOV12_REQUIRE=gpu,flash-attn,tensorrt names what must be there: if a part is missing, the run fails.
# --record=benchmarks/results/verified_NAME.json writes what scripts/verified.py puts into the README's table.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
exec python -m pytest -m smoke tests/smoke -rA --tb=short -p no:cacheprovider "$@"
