#!/usr/bin/env bash
# Regenerates the requirement files with hashes from requirements/*.in, in about a minute. Needs uv.
# Arguments such as --upgrade go to `uv pip compile`. Without --upgrade, versions change only if they must.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../requirements"

command -v uv >/dev/null || {
  echo "lock.sh: uv is missing: pip install uv" >&2
  exit 1
}

compile() { # source, file to write, lowest Python, options of `uv pip compile`...
  UV_CUSTOM_COMPILE_COMMAND=scripts/lock.sh uv pip compile --config-file uv.toml \
    --universal --python-version "$3" --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --quiet \
    "$1" --output-file "$2" "${@:4}"
}

compile lock.in lock.txt 3.10 "$@"
compile current.in current.txt 3.11 "$@"
for name in lint docs gpu_build; do compile "$name.in" "$name.txt" 3.10 "$@"; done
compile gpu.in gpu.txt 3.10 --no-deps "$@"
for name in lock current; do # the same OpenCV without windows, for scripts/env.sh
  sed -n 's/^opencv-python\(==[^ ]*\).*/opencv-python-headless\1/p' "$name.txt" |
    compile - "$name-headless.txt" 3.10 --no-deps "$@"
done
