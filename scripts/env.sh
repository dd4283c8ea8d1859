# shellcheck shell=bash
# The other scripts source this file. It puts a Python with this package and its locked requirements first on PATH.
# In the image or an active `yolov12` environment, this is the Python of the environment. Else it is the Python of .venv,
# which is made on first use.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() { # prints the path of a Python for which torch 2.3.1 has wheels
  local name
  for name in python3.11 python3.12 python3.10 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "yolov12: Python 3.10, 3.11 or 3.12 is needed to make .venv, and none is on PATH" >&2
  return 1
}

install_into() { # python, requirement files...
  local python=$1 file
  shift
  for file in "$@"; do
    "$python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$root/requirements/$file"
  done
}

install_package() { # python
  "$1" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e "$root"
}

make_venv() { # does nothing if this clone has a .venv with these requirements, made at this path
  local stamp python
  stamp=$root/.venv/installed-$( (cat "$root/requirements/lock.txt" "$root/pyproject.toml" && echo "$root") | cksum | tr ' ' -)
  [ ! -e "$stamp" ] || return 0
  python=$(find_python) || return 1
  echo "yolov12: making .venv from requirements/lock.txt (5.5 GB, a few minutes, once)" >&2
  "$python" -m venv --clear "$root/.venv" || {
    echo "yolov12: making .venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    return 1
  }
  install_into "$root/.venv/bin/python" lock.txt
  install_package "$root/.venv/bin/python"
  touch "$stamp"
}

if [ "${CONDA_DEFAULT_ENV:-}" = yolov12 ]; then
  python -I -c 'import yolov12.autopatch' 2>/dev/null || install_package python # -I ignores the current folder
else
  if command -v flock >/dev/null; then # only one script makes .venv, others wait
    exec 9>"$root/.venv.lock"
    flock 9
  fi
  make_venv
  exec 9>&-
  export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
fi

# If the image is read-only or the user is not root, files are written to the current folder.
work=$root
[ -w "$root" ] || work=$PWD
if [ ! -w "$work" ]; then
  echo "yolov12: neither $root nor $PWD can be written to: docker run -v \"\$PWD:/work\" -w /work ..." >&2
  exit 1
fi
[ -w "${HOME:-/}" ] || export HOME=$work
if [ ! -w "${TMPDIR:-/tmp}" ]; then
  export TMPDIR=$work/.tmp
  mkdir -p "$TMPDIR"
fi

# Ultralytics stores its settings per user, also the folders of data sets and runs. Here they are stored per clone.
if [ -z "${YOLO_CONFIG_DIR:-}" ]; then
  export YOLO_CONFIG_DIR=$work/.ultralytics
  if ! grep -qsF "\"$work/runs\"" "$YOLO_CONFIG_DIR/Ultralytics/settings.json"; then
    mkdir -p "$YOLO_CONFIG_DIR"
    python - "$work" >/dev/null <<'PYTHON'
import sys
from ultralytics.utils import SETTINGS

SETTINGS.update({f"{name}_dir": f"{sys.argv[1]}/{name}" for name in ("datasets", "weights", "runs")})
PYTHON
  fi
fi
