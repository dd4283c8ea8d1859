#!/usr/bin/env bash
# Installs flash-attn and TensorRT when the image is built. The argument is a requirements file with both.
# From the environment: FLASH_ATTN=source|wheel, FLASH_ATTN_SHA256 for a wheel, and the variables of flash-attn's setup.py.
# Every wheel is made or downloaded first, and installed only if all digests are right.
set -euo pipefail
requirements=$1
folder=$(dirname "$requirements")

refuse() {
  echo "docker/gpu-packages.sh: $*" >&2
  exit 2
}

case ${FLASH_ATTN:-source} in
  source) export FLASH_ATTENTION_FORCE_BUILD=TRUE ;;
  wheel)
    [[ ${FLASH_ATTN_SHA256:-} =~ ^[0-9a-f]{64}$ ]] ||
      refuse "FLASH_ATTN=wheel needs FLASH_ATTN_SHA256, the SHA-256 of upstream's wheel: see docs/guides/container.md"
    # setup.py then downloads upstream's wheel for this torch, Python and CUDA. If it cannot, it would compile for hours;
    # this variable makes it give up, and the digest below is wrong.
    export FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE
    ;;
  *) refuse "FLASH_ATTN=$FLASH_ATTN is not known: source or wheel" ;;
esac

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
# TensorRT's package would install its libraries by a pip of its own, which checks no digest.
export NVIDIA_TENSORRT_DISABLE_INTERNAL_PIP=1
# pip's cache would give a wheel that was refused once to a later build.
pip() { python -m pip --no-cache-dir --disable-pip-version-check "$@"; }

pip install --no-deps --require-hashes -r "$folder/gpu_build.txt"
pip wheel --no-deps --no-build-isolation --require-hashes --wheel-dir "$wheels" -r "$requirements"
cp "$folder/gpu.sha256" "$wheels/digests"
if [ "${FLASH_ATTN:-source}" = wheel ]; then
  for wheel in "$wheels"/flash_attn-*.whl; do echo "$FLASH_ATTN_SHA256  ${wheel##*/}" >>"$wheels/digests"; done
fi
(cd "$wheels" && sha256sum --check --strict digests)
pip install --no-deps --no-index "$wheels"/*.whl
