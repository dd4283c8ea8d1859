#!/usr/bin/env bash
# Runs the tests: everything that guards a promise, in about ten minutes on two cores. There are three processes for two
# cores, as some tests wait for others.
# scripts/test.sh --deep searches longer: ten times the cases of each property, and trainings and exports at full size.
# Other arguments go to pytest too, as in scripts/test.sh -m 'not slow'; on a GPU, which processes would have to share,
# scripts/test.sh -n 0 -m gpu.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
cores=$(env -u OMP_NUM_THREADS nproc) # nproc prints the value of this variable, if there is one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n "$((cores * 3 / 2))" --dist worksteal "$@"
