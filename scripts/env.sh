# shellcheck shell=bash
# The other scripts source this file. It puts a Python with this package and its locked requirements first on PATH.
# In the image or an active `yolov12` environment, this is the Python of the environment. Else it is the Python of a
# virtual environment that is made on first use: .venv from requirements/lock.txt, .venv-current from current.txt.
# YOLOV12_LOCK=lock or YOLOV12_LOCK=current chooses. Without it, .venv is taken, unless every Python is too new for it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() { # prints the path of a Python for which the packages of the lock have wheels
  local name minor names='python3.11 python3.12 python3.10 python3' first=10 last=12
  if [ "$lock" = current ]; then
    names='python3.13 python3.14 python3.12 python3.11 python3' first=11 last=14
  fi
  for name in $names; do
    minor=$("$name" -c 'import sys; print(sys.version_info.minor)' 2>/dev/null) || continue
    if [ "$minor" -ge $first ] && [ "$minor" -le $last ]; then
      command -v "$name"
      return
    fi
  done
  echo "yolov12: Python 3.10 to 3.12 is needed for requirements/lock.txt, 3.11 to 3.14 for current.txt," \
    "and none is on PATH" >&2
  return 1
}

choose() { # lock: also sets its virtual environment, and the file there that says that all of the lock is installed
  lock=$1
  venv=$root/.venv
  [ "$lock" = lock ] || venv=$root/.venv-$lock
  local files=("$root/requirements/$lock.txt" "$root/requirements/$lock-headless.txt" "$root/pyproject.toml")
  stamp=$venv/installed-$( (cat "${files[@]}" && echo "$root") | cksum | tr ' ' -)
}

choose_lock() {
  case "${YOLOV12_LOCK:-}" in
    lock | current) choose "$YOLOV12_LOCK" ;;
    "")
      choose lock
      if [ ! -e "$stamp" ] && ! find_python >/dev/null 2>&1; then choose current; fi
      ;;
    *)
      echo "yolov12: YOLOV12_LOCK=$YOLOV12_LOCK: give lock or current" >&2
      return 2
      ;;
  esac
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

empty_venv() { # deletes only what a script has made here, never an environment of the user's
  local mark=$venv/made-by-scripts
  if compgen -G "$venv/installed-*" >/dev/null; then touch "$mark"; fi
  if [ -L "$venv" ] || { [ ! -e "$mark" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; }; then
    echo "yolov12: $venv was not made by the scripts for this clone. Move it away, or activate an environment with" \
      "this package and call yolov12 itself: yolov12 train ..." >&2
    exit 2
  fi
  mkdir -p "$venv"
  touch "$mark"
  find "$venv" -mindepth 1 -maxdepth 1 ! -name "${mark##*/}" -exec rm -rf {} +
}

make_venv() { # does nothing if this clone has one with these requirements, made at this path
  local python
  [ ! -e "$stamp" ] || return 0
  python=$(find_python) || return 1
  empty_venv
  echo "yolov12: making $(basename "$venv") from requirements/$lock.txt (6 to 7 GB, a few minutes, once)" >&2
  "$python" -m venv "$venv" || {
    echo "yolov12: making $(basename "$venv") failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    return 1
  }
  install_into "$venv/bin/python" "$lock.txt"
  # opencv-python opens windows, and for that loads libraries of a desktop (libGL.so.1), which a server seldom has.
  if ! "$venv/bin/python" -c 'import cv2' 2>/dev/null; then
    echo "yolov12: opencv-python cannot be loaded here; installing opencv-python-headless (no show=True) instead" >&2
    "$venv/bin/python" -m pip uninstall --quiet --yes opencv-python
    install_into "$venv/bin/python" "$lock-headless.txt"
  fi
  install_package "$venv/bin/python"
  touch "$stamp"
}

if [ "${CONDA_DEFAULT_ENV:-}" = yolov12 ]; then
  python -I -c 'import yolov12.autopatch' 2>/dev/null || install_package python # -I ignores the current folder
else
  choose_lock
  if [ ! -e "$stamp" ] && command -v flock >/dev/null; then # only one script makes an environment, others wait
    exec 9>"$root/.venv.lock"
    flock 9
  fi
  make_venv
  exec 9>&-
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
fi

# If the image is read-only or the user is not root, files are written to the current folder.
work=$root
[ -w "$root" ] || work=$PWD
if [ ! -w "$work" ]; then
  echo "yolov12: neither $root nor $PWD can be written to: docker run -v \"\$PWD:/work\" -w /work ..." >&2
  exit 2
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
