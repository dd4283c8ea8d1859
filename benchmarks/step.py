"""The engine's step: images/s and GPU time by kind of kernel, against an earlier commit and stock.

    git worktree add /tmp/before COMMIT
    python -m benchmarks step --before /tmp/before --out benchmarks/results/step.json      (about 3 minutes on one GPU)
    python -m benchmarks step --out part.json --device cpu --small                         (half a minute on the CPU)

Every variant runs in a process of its own. All of them stay alive and take turns on the card: A B C A B C. A step is
the forward pass, the loss and the backward pass of 256 images in micro-batches of one size, YOLO12 at 640 in fp16,
without data loading and without the optimizer. Stock runs the same micro-batches one after the other. When all times
are known, a profile of one step shows which kernels take the time. On a CPU, times are CPU times, in fp32, and
operations stand for kernels.
`--graphs` adds the engine with CUDA graphs, and the others run without. `--deterministic` is the mode of
Ultralytics' trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_SECONDS = 3.0
"""Seconds after which a variant's turn ends, from the second step on."""
KINDS = {
    "BatchNorm": r"^_?(statistics|normalize|gradient_sums|gradient)$|batch_?norm|bn_(fw|bw)",
    "upsampling": r"upsample|^(enlarge|gather)$",
    "image": r"^(scale|render)$",
    "loss": r"^(corners_of|pair_values|take|resolve|won|(box|entropy)_gradient|box_loss|entropy)$",
    "attention": r"flash|fmha|attention",
    "concatenation": r"CatArray",
    "convolution": r"conv|cudnn|xmma|cutlass|gemm|wgrad|dgrad|fprop|nhwc|nchw|nvjet|gemv",
    "copy": r"copy|Memcpy|Memset|fill",
    "reduction": r"reduce|Reduce|scan|sort|topk|index|gather|scatter",
    "elementwise": r"elementwise|multi_tensor|silu",
}


class Child:
    """Trains in this process as it is asked to on standard input."""

    def __init__(self, variant: str, cfg: str, images: int, size: int, device: str) -> None:
        import torch
        from memory import prepare

        self.variant, self.images, self.is_on_gpu = variant, images, device == "cuda"
        where = {} if self.is_on_gpu else {"device": device}  # an earlier commit may know only the GPU
        self.model, self.task, self.scaler, self.batch = prepare(images, size, cfg=cfg, **where)
        self.engines: dict[int, Any] = {}
        self.resident_bytes = torch.cuda.memory_allocated()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run steps and return their times, or the profile of one step.

        Args:
            request: `micro_batch` and `steps`; `profile` instead of steps.
        """
        import torch

        micro_batch = request["micro_batch"]
        if request.get("profile"):
            return self._profile(micro_batch)
        if self.is_on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        while len(seconds) < request["steps"] and (len(seconds) < 2 or sum(seconds) < MOST_SECONDS):
            begin = self._now()
            self._step(micro_batch)
            seconds.append(self._now() - begin)
        found: dict[str, Any] = {"ms": [round(1e3 * each, 2) for each in seconds]}
        if self.is_on_gpu:
            peak_bytes = torch.cuda.max_memory_allocated()
            if self.variant == "graphs":  # the memory of graphs is reserved, not allocated
                peak_bytes = self.engines[micro_batch].latest.peak_bytes
            found["mb_per_image"] = (peak_bytes - self.resident_bytes) / micro_batch / 1e6
        return found

    def _now(self) -> float:
        """Return the time after all work of the GPU, in seconds; on a CPU, the CPU time of this process."""
        import torch

        if not self.is_on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _step(self, micro_batch: int) -> None:
        import torch

        autocast = (
            functools.partial(torch.autocast, "cuda", torch.float16) if self.is_on_gpu else contextlib.nullcontext
        )
        if self.variant == "stock":
            from benchmarks.common.model import part_of

            for start in range(0, self.images, micro_batch):
                with autocast():
                    part = self.task.preprocess(part_of(self.batch, start, start + micro_batch))
                    loss, _ = self.model(part)
                self.scaler.scale(loss.sum()).backward()
        else:
            with autocast():
                self._engine(micro_batch).step(self.batch)
        self.model.zero_grad()

    def _engine(self, micro_batch: int) -> Any:
        if micro_batch not in self.engines:
            from yolov12 import mas
            from yolov12.models.activations import activations

            self.engines[micro_batch] = mas.Engine(
                self.model,
                self.task,
                mas.Config(micro_batch=micro_batch, bn_group=min(micro_batch, 32), **self._settings()),
                backward=lambda loss: self.scaler.scale(loss).backward(),
                activations=activations(self.model),
                log=lambda line: print(line, file=sys.stderr, flush=True),
            )
        return self.engines[micro_batch]

    def _settings(self) -> dict[str, Any]:
        from yolov12 import mas

        knows_graphs = "cuda_graphs" in mas.Config.__dataclass_fields__  # an earlier commit may not
        return {"cuda_graphs": self.variant == "graphs"} if knows_graphs else {}

    def _profile(self, micro_batch: int) -> dict[str, Any]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if self.is_on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as found:
            self._step(micro_batch)
        times: dict[str, float] = {}
        count = 0
        for event in found.events():
            if event.device_type == (DeviceType.CUDA if self.is_on_gpu else DeviceType.CPU):
                took_us = event.time_range.elapsed_us() if self.is_on_gpu else event.self_cpu_time_total
                times[event.name] = times.get(event.name, 0.0) + took_us / 1e3
                count += 1
        kinds: dict[str, float] = {}
        for name, ms in times.items():
            kind = kind_of(name)
            kinds[kind] = kinds.get(kind, 0.0) + ms
        longest = sorted(times.items(), key=lambda pair: -pair[1])[:40]
        return {
            "busy_ms": round(sum(times.values()), 2),
            "launches": count,
            "kinds_ms": {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda pair: -pair[1])},
            "longest_ms": {name[:110]: round(ms, 2) for name, ms in longest},
        }


class Variant:
    """A child process.

    Args:
        name: `stock`, or another name for this package.
        folder: Checkout whose code it runs.
        cfg: Yaml of the model.
        images: Number of images in a step.
        size: Height and width of the images in pixels.
        device: `cuda` or `cpu`.
        deterministic: True for PyTorch's deterministic mode.
    """

    def __init__(
        self, name: str, folder: Path, *, cfg: str, images: int, size: int, device: str, deterministic: bool = False
    ) -> None:
        self.name = name
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(folder), str(folder / "benchmarks"), str(HERE), os.environ.get("PYTHONPATH", "")]
            ),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            **({"YOLOV12_AUTOPATCH": "0"} if name == "stock" else {}),
            **({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {}),
        }
        command = [sys.executable, __file__, "--child", name, "--cfg", cfg]
        command += ["--images", str(images), "--size", str(size), "--device", device]
        command += ["--deterministic"] if deterministic else []
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Let the process work, and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(options: argparse.Namespace) -> None:
    """Answer requests, one line of JSON each."""
    if sys.path[0] == str(HERE):  # `memory.py` is that of the variant's commit
        del sys.path[0]
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if options.deterministic:  # as Ultralytics' init_seeds does
            import torch

            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.deterministic = True
        child = Child(options.child, options.cfg, options.images, options.size, options.device)
        for line in sys.stdin:
            answers.write(json.dumps(child.answer(json.loads(line))) + "\n")
            answers.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--cfg", default="yolo12s.yaml")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[128, 32, 8])
    parser.add_argument("--profiles", nargs="*", type=int, default=[128, 32], help="micro-batches to profile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="few small images, to try the benchmark")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options)
        return 0
    if options.small:
        vars(options).update(cfg="yolo12n.yaml", images=8, size=64, micro_batches=[4], profiles=[4], rounds=1, steps=1)

    from benchmarks.common import report  # an earlier commit, which a child runs, may lack it

    now = HERE.parent
    folders = {
        "before": options.before,
        "now": now,
        "graphs": now if options.graphs else None,
        "stock": None if options.no_stock else now,
    }
    settings = {name: getattr(options, name) for name in ("cfg", "images", "size", "device", "deterministic")}
    variants = [Variant(name, folder, **settings) for name, folder in folders.items() if folder is not None]
    before = {"before": report.commit(options.before)} if options.before else {}
    result = report.Report(options.out, options.device, rows=[], profiles={}, **before)

    for micro_batch in options.micro_batches:
        for variant in variants:
            variant.ask(micro_batch=micro_batch, steps=5)  # compiles kernels, searches them, and captures graphs
        for round_ in range(options.rounds):
            for variant in variants:
                found = variant.ask(micro_batch=micro_batch, steps=options.steps)
                rate = 1e3 * options.images / statistics.median(found["ms"])
                row = {
                    "round": round_,
                    "micro_batch": micro_batch,
                    "variant": variant.name,
                    "images_per_s": rate,
                    **found,
                }
                result["rows"].append(row)
                print(micro_batch, round_, variant.name, f"{rate:.0f} images/s", found, flush=True)
                result.write()
        result["ratios"] = ratios(result["rows"])
        print(json.dumps([each for each in result["ratios"] if each["micro_batch"] == micro_batch]), flush=True)
        result.write()
    # After all times: once a process has profiled, CUPTI stays attached to it, and every launch takes longer.
    for micro_batch in (each for each in options.micro_batches if each in options.profiles):
        for variant in variants:
            found = variant.ask(micro_batch=micro_batch, profile=True)
            result["profiles"][f"{variant.name} {micro_batch}"] = found
            told = {key: value for key, value in found.items() if key != "longest_ms"}
            print(micro_batch, variant.name, told, flush=True)
            result.write()
    for variant in variants:
        variant.end()
    return 0


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times as many images a second the engine runs as the others, in each round.

    Args:
        rows: Rows of the result.
    """
    return [
        {
            "micro_batch": now["micro_batch"],
            "round": now["round"],
            "over": other["variant"],
            "ratio": round(now["images_per_s"] / other["images_per_s"], 3),
        }
        for now in rows
        for other in rows
        if now["variant"] == "now" != other["variant"]
        and all(now[key] == other[key] for key in ("micro_batch", "round"))
    ]


if __name__ == "__main__":
    sys.exit(main())
