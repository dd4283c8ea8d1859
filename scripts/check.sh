#!/usr/bin/env bash
# Says what this machine can do, and exits with 1 if it cannot train.
# Arguments are key=value, as in scripts/check.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 check "$@"
