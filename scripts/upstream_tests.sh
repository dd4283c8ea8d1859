#!/usr/bin/env bash
# Runs Ultralytics' own tests with and without this package, and fails if a test passes only without it.
# Arguments go to scripts/upstream_tests.py: scripts/upstream_tests.sh --only test_engine.py --folder /tmp/upstream.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python "$root/scripts/upstream_tests.py" "$@"
