"""A training on the CPU with two loader workers, which says when a batch is done and waits for a line to go on.

python pool.py MODEL SETTINGS WORKER_MIB GROUP

SETTINGS is JSON. Each worker holds WORKER_MIB more than usual. GROUP is the folder of a control group that the process
joins; empty for none. The line `stop` ends the training.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info
from ultralytics import YOLO
from ultralytics.data.dataset import YOLODataset


def main(model_yaml: str, settings: str, worker_mib: str, group: str) -> None:
    if group:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
    held, stock = [], YOLODataset.__getitem__

    def hold(dataset, index):
        if get_worker_info() is not None and not held:
            held.append(np.ones(int(worker_mib) << 20, np.uint8))
        return stock(dataset, index)

    def have_workers(trainer):
        trainer.args.workers = 2  # without a GPU, Ultralytics uses no workers

    def wait(trainer):
        print(f"\nbatch {trainer.save_dir}", flush=True)  # the progress bar is on a line of its own
        if sys.stdin.readline() == "stop\n":
            raise KeyboardInterrupt

    YOLODataset.__getitem__ = hold
    model = YOLO(model_yaml)
    model.add_callback("on_pretrain_routine_start", have_workers)
    model.add_callback("on_train_batch_end", wait)
    try:
        model.train(**json.loads(settings))
    except KeyboardInterrupt:
        print("\nstopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
