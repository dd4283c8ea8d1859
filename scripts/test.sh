#!/usr/bin/env bash
# Runs the tests, a process on each core: everything that guards a promise, in under 10 minutes on two cores.
# scripts/test.sh --deep searches longer: ten times the cases of each property, and trainings and exports at full size.
# Other arguments go to pytest too, as in scripts/test.sh -m 'not slow'; on a GPU, which processes would have to share,
# scripts/test.sh -n 0 -m gpu.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n logical --dist worksteal "$@"
