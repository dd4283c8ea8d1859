#!/usr/bin/env bash
# Tries on this machine's GPU what the image is for: attention, a training under pressure, val, export. Minutes.
# Attention needs flash-attn, TensorRT itself; training, val and ONNX need neither, nor the image.
# Arguments go to pytest, as in scripts/smoke.sh --junitxml=smoke.xml. What this machine cannot do is skipped, and said.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
exec python -m pytest -m smoke tests/smoke -rA --tb=short -p no:cacheprovider "$@"
