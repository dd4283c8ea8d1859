"""`yolov12 check [device=0] [--json]` reports what this machine has and whether it can train.

device=0      the device to train on, as in a training: 0, 0,1, cpu or mps; by default GPU 0, or the CPU without a GPU
--json        print JSON; if training cannot work, stderr says why

It lists GPUs and their free memory, the driver, versions, and memory of the host, and tries attention and a training
step on the device. The last line says whether training can work, and if not, why. Nothing is installed or changed.

The exit status is 0 if training can work, 1 if it cannot, and 2 if an argument is not valid.
"""

from __future__ import annotations

import contextlib
import sys
from difflib import get_close_matches

from yolov12.check.devices import parse_device, resolve_device
from yolov12.check.findings import problems, warnings
from yolov12.check.gpu_info import read_cuda
from yolov12.check.host_info import read_host, read_versions
from yolov12.check.installation import read_gpu_packages, read_image, read_lock
from yolov12.check.probe import probe_attention, probe_training
from yolov12.check.render import as_json, as_text, verdict
from yolov12.check.report import Report
from yolov12.errors import ConfigError
from yolov12.seams import PINNED

__all__ = ["Report", "main", "problems", "read_gpu_packages", "read_report", "warnings"]


def main(args: list[str]) -> int:
    """Check this machine and print the report.

    The last line says whether training can work, and if not, why. With `--json` that line goes to stderr.

    Args:
        args: The words after `yolov12 check`: `device=...` and `--json`.

    Returns:
        The exit status: 0 if training on the device can work, else 1.

    Raises:
        ConfigError: An argument is unknown, or the device is malformed.
    """
    device, json = _parse(args)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print while they load; stdout is for the report
        report = read_report(device)
    failed = bool(problems(report))
    print(as_json(report) if json else as_text(report))
    if failed and json:
        print(verdict(report), file=sys.stderr)
    return int(failed)


# The machine is read once into a `Report`. Findings and output are pure functions of that report.
def read_report(device: str = "") -> Report:
    """Read this machine, and probe attention and a training step on the device.

    Args:
        device: `cpu`, `mps`, `0`, `cuda:0`, `0,1` or `-1`, as for training. Empty means GPU 0, or the CPU if there is
            no GPU.

    Returns:
        All readings.

    Raises:
        ConfigError: The device is malformed. A device that does not exist raises nothing: `problems` reports it.
    """
    wanted = parse_device(device)
    host = read_host()
    cuda, gpus = read_cuda(host.ram_available_bytes)
    devices = resolve_device(wanted, gpus, cuda.visible_devices)
    there = {"cpu", *(["mps"] if host.has_mps else []), *(f"cuda:{gpu.index}" for gpu in gpus if gpu.index is not None)}
    usable = [name for name in devices if name in there]
    return Report(
        device=device,
        devices=devices,
        cuda=cuda,
        gpus=gpus,
        training=tuple(map(probe_training, usable)),
        attention=tuple(result for name in usable for result in probe_attention(name)),
        host=host,
        versions=read_versions(),
        pinned_ultralytics=PINNED,
        image=read_image(),
        lock=read_lock(),
        gpu_packages=read_gpu_packages(),
    )


def _parse(args: list[str]) -> tuple[str, bool]:
    device, json = "", False
    for word in args:
        key, _, value = word.lstrip("-").partition("=")
        if key == "device" and value:
            device = value
        elif key == "json" and value.lower() in ("", "true", "false"):
            json = value.lower() != "false"
        elif key in ("device", "json"):
            raise ConfigError(f"'{word}' has no value that can be used. Write it as device=0 or --json")
        else:
            near = get_close_matches(key, ("device", "json"), n=1)
            hint = f". Did you mean '{near[0]}'?" if near else ". Arguments of check: device=0, --json"
            raise ConfigError(f"unknown argument '{word}'{hint}")
    return device, json
