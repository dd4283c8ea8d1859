#!/usr/bin/env bash
# Trains a model. Without arguments, begins to teach the weights of this package two new classes, a few minutes on two
# CPU cores, with a batch that does not fit into the memory that it may use.
# Arguments are key=value, as in scripts/train.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 train "$@"
