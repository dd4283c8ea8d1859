#!/usr/bin/env bash
# Runs the tests, a process on each core. Arguments go to pytest, as in scripts/test.sh -m 'not slow'; on a GPU, which
# they would have to share, scripts/test.sh -n 0 -m gpu.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n logical --dist loadfile "$@"
