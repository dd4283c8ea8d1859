#!/usr/bin/env bash
# Trains by itself when labelled images arrive in a folder.
# Arguments are key=value, as in scripts/watch.sh data=line.yaml inbox=new model=best.pt.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 watch "$@"
