#!/usr/bin/env bash
# Exports. Without arguments: the weights trained last, to ONNX.
# Arguments are key=value, as in scripts/export.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 export "$@"
