#!/usr/bin/env bash
# Builds and tests the image with docker, podman or buildah, the first that works.
#   scripts/image.sh build [arguments of `docker build`]
#   scripts/image.sh test [arguments of pytest]
# If the base images cannot be pulled, stand-ins replace them: a Debian for the CUDA images and a small script for conda,
# without flash-attn and TensorRT. This needs buildah and mmdebstrap. Everything else is the same.
# Exit status 75 means: this machine cannot build the image, and nothing was tried.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${YOLOV12_IMAGE:-yolov12}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/yolov12-image

tool() {
  local name
  for name in docker podman buildah; do
    if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
  echo "scripts/image.sh: docker, podman or buildah is needed, and none works here" >&2
  return 75
}

default_of() { # name: prints the default of a Dockerfile argument
  sed -n "s/^ARG $1=//p" "$root/Dockerfile" | head -n 1
}

can_pull() { "$tool" pull --quiet "$(default_of CUDA_RUNTIME)" >/dev/null 2>&1; }

check_space() { # buildah stores five copies of the 7 GB image while it commits
  local free
  free=$(df --output=avail -BG "$(buildah info --format '{{.store.GraphRoot}}')" | tail -n 1 | tr -dc 0-9)
  if [ "$free" -lt 36 ]; then
    echo "scripts/image.sh: building needs 36 GB where buildah keeps images, and $free GB are free (buildah rmi --prune)" >&2
    return 75
  fi
}

bud() { # tag, arguments of `buildah bud`: builds the image and deletes the one that had the tag
  local old
  old=$(buildah images --quiet "$1" 2>/dev/null || true)
  buildah bud --tag "$@"
  [ -z "$old" ] || buildah rmi "$old" >/dev/null 2>&1 || true # fails if a container uses it
}

make_stand_in() { # builds a base image with what the Dockerfile needs of the CUDA and conda images
  local folder=$cache/stand-in
  mkdir -p "$folder"
  cp "$root"/docker/stand-in/* "$folder"
  chmod 755 "$folder/conda"
  cp /etc/ssl/certs/ca-certificates.crt "$folder"
  if [ ! -e "$folder/base.tar" ]; then
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3.11-dev,python3.11-venv bookworm "$folder/unfinished.tar"
    mv "$folder/unfinished.tar" "$folder/base.tar"
  fi
  bud localhost/yolov12-stand-in --quiet "$folder"
}

build() {
  local arguments=()
  if ! can_pull; then
    if [ "$tool" != buildah ] || ! command -v mmdebstrap >/dev/null; then
      echo "scripts/image.sh: the base images cannot be pulled; stand-ins need buildah and mmdebstrap" >&2
      return 75
    fi
    check_space
    echo "scripts/image.sh: the base images cannot be pulled: building on stand-ins, without conda, flash-attn and TensorRT" >&2
    make_stand_in
    local name
    for name in CUDA_DEVEL CUDA_RUNTIME CONDA; do arguments+=(--build-arg "$name=localhost/yolov12-stand-in"); done
    arguments+=(--build-arg GPU_REQUIREMENTS=)
  fi
  if [ "$tool" = buildah ]; then
    bud "$image" --network host "${arguments[@]}" "$@" "$root"
  else
    DOCKER_BUILDKIT=1 "$tool" build --tag "$image" "${arguments[@]}" "$@" "$root"
  fi
}

tool=$(tool)
if [ "$tool" = buildah ] && [ "$(id -u)" = 0 ]; then # this is mostly inside a container
  export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot} STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
fi
case "${1:-}" in
  build)
    shift
    build "$@"
    ;;
  test)
    shift
    . "$root/scripts/env.sh"
    cd "$root"
    YOLOV12_IMAGE=$image YOLOV12_IMAGE_TOOL=$tool exec python -m pytest -m image tests/image "$@"
    ;;
  *)
    sed -n '2,4s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
