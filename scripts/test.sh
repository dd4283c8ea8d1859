#!/usr/bin/env bash
# Runs the tests, with one process per core. Arguments go to pytest, as in scripts/test.sh -m 'not slow'.
# Tests on a GPU must not share it: scripts/test.sh -n 0 -m gpu.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n logical --dist loadfile "$@"
