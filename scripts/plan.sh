#!/usr/bin/env bash
# Predicts the memory of a training without a GPU. The exit status is 1 if the training does not fit.
# Arguments are key=value, as in scripts/plan.sh model=yolov12s.yaml batch=256 gpu=T4.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 plan "$@"
