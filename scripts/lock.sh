#!/usr/bin/env bash
# Regenerates the requirement files with hashes from requirements/*.in, in about a minute. Needs uv.
# Arguments such as --upgrade go to `uv pip compile`. Without --upgrade, versions change only if they must.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../requirements"

command -v uv >/dev/null || {
  echo "lock.sh: uv is missing: pip install uv" >&2
  exit 1
}
for name in lock lint docs gpu; do
  options=("$@")
  [ "$name" != gpu ] || options+=(--no-deps)
  UV_CUSTOM_COMPILE_COMMAND=scripts/lock.sh uv pip compile --config-file uv.toml \
    --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --quiet \
    "$name.in" --output-file "$name.txt" "${options[@]}"
done
