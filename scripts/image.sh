#!/usr/bin/env bash
# Builds and tests the image with docker, podman or buildah, the first that works.
#   scripts/image.sh build [arguments of `docker build`]
#   scripts/image.sh test [arguments of pytest]
#   scripts/image.sh pin          writes the digests of the base images into the Dockerfile, as the registry tells them
# YOLOV12_IMAGE is the tag, YOLOV12_LOCK=current takes the newest versions, without flash-attn and TensorRT.
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

can_pull() { # arguments of the build, which may have another base, such as that of a mirror
  local word base
  base=$(default_of CUDA_RUNTIME)
  for word in "$@"; do
    word=${word#--build-arg=}
    [[ $word != CUDA_RUNTIME=* ]] || base=${word#*=}
  done
  "$tool" inspect --type image "$base" >/dev/null 2>&1 || "$tool" pull --quiet "$base" >/dev/null 2>&1
}

revision() { # prints the commit of the working tree, or nothing without git
  git -C "$root" describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || true
}

source_of() { # prints the address of the repository, without a password in it
  git -C "$root" remote get-url origin 2>/dev/null | sed 's|//[^/@]*@|//|' || true
}

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

print_size() {
  local bytes
  if [ "$tool" = buildah ]; then
    bytes=$(buildah inspect --type image --format '{{.Manifest}}' "$image" |
      python3 -c 'import json, sys; print(sum(layer["size"] for layer in json.load(sys.stdin)["layers"]))')
  else
    bytes=$("$tool" image inspect --format '{{.Size}}' "$image")
  fi
  echo "scripts/image.sh: $image has $((bytes / 1000000)) MB"
}

pin() {
  local name reference digest
  for name in CUDA_DEVEL CUDA_RUNTIME CONDA; do
    reference=$(default_of "$name")
    reference=${reference%@*}
    "$tool" pull --quiet "$reference" >/dev/null
    if [ "$tool" = buildah ]; then
      digest=$(buildah images --format '{{.Digest}}' "$reference")
    else
      digest=$("$tool" image inspect --format '{{index .RepoDigests 0}}' "$reference")
    fi
    sed -i "s|^ARG $name=.*|ARG $name=$reference@${digest#*@}|" "$root/Dockerfile"
    echo "$name=$reference@${digest#*@}"
  done
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
  local arguments=(--build-arg "REVISION=$(revision)" --build-arg "SOURCE=$(source_of)")
  case ${YOLOV12_LOCK:-lock} in
    lock) ;;
    current) arguments+=(--build-arg LOCK=current --build-arg GPU_REQUIREMENTS=) ;;
    *)
      echo "scripts/image.sh: YOLOV12_LOCK=$YOLOV12_LOCK is not known: lock or current" >&2
      return 2
      ;;
  esac
  if ! can_pull "$@"; then
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
  print_size
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
  pin) pin ;;
  *)
    sed -n '2,6s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
