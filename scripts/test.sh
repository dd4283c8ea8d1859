#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest, as in scripts/test.sh -m 'not slow'.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
exec python -m pytest "$@"
