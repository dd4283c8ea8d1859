#!/usr/bin/env bash
# Trains a model. Without arguments, trains YOLOv12-N on the embedded data set, about a minute on two CPU cores.
# Arguments are key=value, as in scripts/train.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 train "$@"
