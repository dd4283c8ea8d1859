#!/usr/bin/env bash
# Exports a model. Without arguments, exports the weights that were trained last to ONNX.
# Arguments are key=value, as in scripts/export.sh device=0.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec yolov12 export "$@"
