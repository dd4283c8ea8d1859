#!/usr/bin/env bash
# docker run IMAGE COMMAND key=value...  runs the script of a command: train, val, predict, export, plan, watch, monitor, check
# docker run IMAGE PROGRAM...            runs any other program
# docker run IMAGE --help                says what there is; --version names the versions
# docker run -it IMAGE                   starts a shell
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

show_help() {
  cat <<'HELP'
yolov12: YOLOv12 with training that adapts to the GPU memory that is free

  docker run --gpus all --shm-size=8g -v "$PWD:/work" -w /work IMAGE train data=coco.yaml batch=256
  docker run --gpus all IMAGE val|predict|export key=value...
  docker run --gpus all IMAGE watch data=line.yaml inbox=new model=best.pt
  docker run IMAGE train --help                 list the arguments of a command
  docker run IMAGE plan model=all mem=16GiB     predict the memory of a training; needs no GPU
  docker run --gpus all IMAGE check             report what this machine has and whether it can train
  docker run --gpus all -it IMAGE               start a shell
  docker run IMAGE COMMAND...                   run any other command, such as python, yolo or torchrun
HELP
}

case "${1:-}" in
  -h | --help | help)
    show_help
    ;;
  watch | train)
    "$root/docker/preflight.sh" "${@:2}"
    exec "$root/scripts/$1.sh" "${@:2}"
    ;;
  val | predict | export | plan | check | monitor)
    exec "$root/scripts/$1.sh" "${@:2}"
    ;;
  "")
    [ ! -t 0 ] || exec bash
    show_help
    printf '\nThis container:\n'
    exec "$root/scripts/check.sh"
    ;;
  --version)
    exec yolov12 --version
    ;;
  -*)
    echo "yolov12: unknown option '$1' before a command: see docker run IMAGE --help" >&2
    exit 2
    ;;
  *)
    exec "$@"
    ;;
esac
