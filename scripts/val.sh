#!/usr/bin/env bash
# Validates a model. Without model=, uses the weights that were trained last.
# Arguments are key=value, as in scripts/val.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 val "$@"
