#!/usr/bin/env bash
# Checks a container before a training. Prints one line per problem, with the docker flag that solves it.
# Arguments are those of the training. The exit status is 1 if training cannot work, else 0.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
oldest_driver=525.60.13 # for CUDA 12.1, https://docs.nvidia.com/cuda/cuda-toolkit-release-notes

say() { echo "yolov12: $*" >&2; }

argument() { # name: prints the value of a key=value argument
  local word
  for word in "${words[@]}"; do
    [ "${word%%=*}" != "$1" ] || echo "${word#*=}"
  done
}

at_least() { # a b: succeeds if version a is b or newer
  [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

check_gpu() {
  local driver
  [ "$(argument device)" != cpu ] || return 0
  if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || [ -z "$driver" ]; then
    say "no GPU was passed to this container: docker run --gpus all ... (training runs on the CPU, slowly)"
  elif ! at_least "$driver" "$oldest_driver"; then
    say "driver $driver of this machine is older than $oldest_driver, which CUDA 12.1 needs: update it, or train with device=cpu"
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
can_train=0
check_gpu || can_train=1
check_shm
check_folder || can_train=1
exit "$can_train"
