#!/usr/bin/env bash
# Reports what this machine has and whether it can train. The exit status is 1 if it cannot.
# Arguments are key=value, as in scripts/check.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 check "$@"
