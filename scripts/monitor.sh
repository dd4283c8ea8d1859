#!/usr/bin/env bash
# Shows the memory of a running training in the terminal: by default of the run that was written last.
# Arguments are a run folder and key=value, as in scripts/monitor.sh runs/detect/train once=True.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 monitor "$@"
