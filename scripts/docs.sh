#!/usr/bin/env bash
# Builds the documentation as a site in site/, with every link checked. A warning is an error.
# Arguments go to `mkdocs build`; `scripts/docs.sh serve` shows the site on http://127.0.0.1:8000 while you write.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
install_into python docs.txt
export NO_MKDOCS_2_WARNING=1 # of the theme's authors about a future version

if [ "${1:-}" = serve ]; then
  exec mkdocs serve "${@:2}"
fi
mkdocs build --strict --clean "$@" # with --quiet, warnings would not count
echo "docs: site/index.html"
