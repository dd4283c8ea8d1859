#!/usr/bin/env bash
# Says what a training will take on a card, without one, and exits with 1 if it does not fit.
# Arguments are key=value, as in scripts/plan.sh model=yolov12s.yaml batch=256 gpu=T4.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 plan "$@"
