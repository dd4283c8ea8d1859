#!/usr/bin/env bash
# Checks a container before a training. Prints one line per problem, with the docker flag that solves it.
# Arguments are those of the training. The exit status is 1 if training cannot work on this machine, 2 if it cannot work
# with these arguments and mounts, else 0.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cuda=$(sed -n "s/^cuda.*= '\([0-9]*\)\..*/\1/p" "${CONDA_PREFIX:-/}"/lib/python3.*/site-packages/torch/version.py 2>/dev/null) || cuda=12
# Oldest driver of a CUDA major version: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
case $cuda in
  13) oldest_driver=580.65.06 ;;
  *) oldest_driver=525.60.13 ;;
esac
# NVIDIA's base images bring a newer user-mode driver, which runs on older kernel drivers of data-center GPUs:
# https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html
newer_driver=$(readlink -m "${CUDA_HOME:-/usr/local/cuda}/compat/libcuda.so.1") # its name ends with its version

say() { echo "yolov12: $*" >&2; }

argument() { # name: prints the value of the last key=value argument with this name
  local word value=
  for word in "${words[@]}"; do
    [ "${word%%=*}" != "$1" ] || value=${word#*=}
  done
  echo "$value"
}

at_least() { # a b: succeeds if version a is b or newer
  [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

check_gpu() {
  local driver
  [ "$(argument device)" != cpu ] || return 0
  if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) || [ -z "$driver" ]; then
    say "no GPU was passed to this container: docker run --gpus all ... (training runs on the CPU, slowly)"
  elif at_least "$driver" "$oldest_driver"; then
    return 0
  elif [ -e "$newer_driver" ] && at_least "${newer_driver##*.so.}" "$oldest_driver"; then
    say "driver $driver of this machine is older than $oldest_driver: CUDA $cuda runs on it on data-center GPUs only (forward compatibility). If no GPU is found, update the driver"
  else
    say "driver $driver of this machine is older than $oldest_driver, which CUDA $cuda needs: update it, or train with device=cpu"
    return 1
  fi
}

check_shm() {
  local free_kib
  free_kib=$(df --output=avail "${SHM:-/dev/shm}" 2>/dev/null | tail -n 1) || return 0
  [ "$free_kib" -gt 65536 ] || say "/dev/shm has $((free_kib / 1024)) MiB, too little for workers: docker run --shm-size=8g ..."
}

check_folder() { # checks the folder of the runs, or its nearest existing parent
  local folder
  folder=$(argument project)
  [ -n "$folder" ] || folder=$(argument work) # of a watch
  if [ -z "$folder" ]; then
    folder=$root/runs
    [ -w "$root" ] || folder=$PWD/runs
  fi
  while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
  if [ ! -w "$folder" ]; then
    say "$folder cannot be written to by user $(id -u): docker run -v \"\$PWD:/work\" -w /work ..., or project= of a mounted folder"
    return 1
  fi
}

words=("$@")
for word in "${words[@]}"; do
  [[ "$word" != --help && "$word" != -h ]] || exit 0
done
status=0
check_gpu || status=1
check_shm
check_folder || status=2
exit "$status"
