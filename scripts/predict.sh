#!/usr/bin/env bash
# Predicts. Without arguments, uses the weights that were trained last and their validation images.
# Arguments are key=value, as in scripts/predict.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 predict "$@"
