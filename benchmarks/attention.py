"""Attention back ends: whether they compute the same, and the time and memory of a YOLO12-S training step with each.

    python -m benchmarks attention --out benchmarks/results/attention.json      (about 3 minutes on one GPU)
    python -m benchmarks attention --out part.json --small --device cpu         (seconds, to try it)

Each configuration runs in a process of its own, as stock Ultralytics must not see our seams. There are two rounds,
A B C A B C, so that a drift of the clock is visible. A step is the forward pass, the loss and the backward pass of
YOLO12-S at 640 in fp16 autocast and channels_last, with 25 random boxes per image, without data loading and without
the optimizer. On a CPU, all is fp32, only PyTorch's attention is compared, and the memory of a step is not measured.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.common.model import autocast, wait
from benchmarks.common.processes import ONE_THREAD, Call
from benchmarks.common.rounds import in_turn

HEADS, HEAD_DIM = 4, 32
TOKENS = (400, 1600)  # YOLOv12 at 640 has 400 tokens per area at P4 and at P5; undivided, P4 has 1600
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float32: 1e-3}
BOXES_PER_IMAGE = 25
SMALL: dict[str, Any] = {"cfg": "yolo12n.yaml", "imgsz": 64}
SMALL_TOKENS = (16, 64)


def step(
    variant: str,
    batch: int,
    deterministic: bool,
    steps: int,
    device: str = "cuda",
    cfg: str = "yolo12s.yaml",
    imgsz: int = 640,
) -> dict[str, Any]:
    """Measure one configuration in this process.

    Args:
        variant: `stock`, `sdpa` or `flash`.
        batch: Number of images in a batch.
        deterministic: True for PyTorch's deterministic algorithms.
        steps: Number of steps to measure.
        device: `cuda` or `cpu`.
        cfg: Yaml of the model.
        imgsz: Size of the images in pixels.
    """
    if variant != "stock":
        from yolov12 import autopatch
        from yolov12.models import attention

        autopatch.apply()
        if variant == "sdpa":
            attention._flash_attn_or_reason = lambda: "turned off for this measurement"  # type: ignore[assignment]
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    if deterministic:  # as Ultralytics' init_seeds does
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    model = DetectionModel(cfg, nc=80, verbose=False).to(device).to(memory_format=torch.channels_last).train()
    model.args = DEFAULT_CFG
    boxes = batch * BOXES_PER_IMAGE
    data = {
        "img": torch.rand(batch, 3, imgsz, imgsz, device=device).contiguous(memory_format=torch.channels_last),
        "batch_idx": torch.arange(boxes, device=device) // BOXES_PER_IMAGE,
        "cls": torch.randint(0, 80, (boxes, 1), device=device).float(),
        "bboxes": torch.rand(boxes, 4, device=device) * 0.3 + 0.2,
    }
    resident_bytes = torch.cuda.memory_allocated()

    def run() -> float:
        start = time.perf_counter()
        with autocast(device):
            loss, _ = model(data)
        (loss.sum() * 128.0).backward()
        model.zero_grad(set_to_none=True)
        wait(device)
        return time.perf_counter() - start

    for _ in range(5):
        run()
    is_on_gpu = device == "cuda"
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [run() for _ in range(steps)]
    peak_bytes = torch.cuda.max_memory_allocated()
    return {
        "variant": variant,
        "deterministic": deterministic,
        "batch": batch,
        "images_per_s": batch / statistics.median(seconds),
        "step_ms": {"median": 1e3 * statistics.median(seconds), "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)},
        "peak_mib": peak_bytes / 2**20 if is_on_gpu else None,
        "mb_per_image": (peak_bytes - resident_bytes) / batch / 1e6 if is_on_gpu else None,
    }


def _functions(device: str) -> dict[str, Any]:
    from yolov12.models import attention as module

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        args = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*args).transpose(1, 2)

    def fused(function: Any) -> Any:
        return lambda q, k, v: function.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    functions = {"math": module._math, "sdpa": sdpa}
    if device != "cuda":
        return functions
    functions |= {
        "sdpa_deterministic_flash": fused(module._DeterministicFlash),
        "sdpa_deterministic_efficient": fused(module._DeterministicEfficient),
    }
    found = module._flash_attn_or_reason()
    if not isinstance(found, str):
        functions["flash_attn"] = found
        functions["flash_attn_deterministic"] = lambda q, k, v: found(q, k, v, deterministic=True)
    return functions


def accuracy(device: str = "cuda", sizes: Sequence[int] = TOKENS) -> list[dict[str, Any]]:
    """Return relative errors ‖x − ref‖ / ‖ref‖ of outputs and gradients against float64.

    Each row also tells whether the backward pass repeats bit for bit.

    Args:
        device: `cuda` or `cpu`, of which PyTorch may lack kernels for fp16.
        sizes: Numbers of tokens.
    """
    from yolov12.models import attention as module

    torch.use_deterministic_algorithms(True, warn_only=True)
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        if device != "cuda" and dtype is torch.float16:
            continue
        for tokens in sizes:
            torch.manual_seed(tokens)
            qkv = torch.randn(8, tokens, HEADS, 3 * HEAD_DIM, device=device, dtype=dtype)
            grad = torch.randn(8, tokens, HEADS, HEAD_DIM, device=device, dtype=dtype)

            def evaluate(function: Any, qkv: Any, grad: Any) -> list[Any]:
                leaf = qkv.clone().requires_grad_()
                out = function(*leaf.split(HEAD_DIM, dim=3))  # the strided views the model passes
                out.backward(grad)
                return [out.detach(), leaf.grad]

            reference = evaluate(module._math, qkv.double(), grad.double())
            for name, function in _functions(device).items():
                if dtype is torch.float32 and "flash" in name:
                    continue
                results = [evaluate(function, qkv, grad) for _ in range(5)]
                errors = [
                    ((x.double() - r).norm() / r.norm()).item() for x, r in zip(results[0], reference, strict=True)
                ]
                repeats = all(torch.equal(results[0][1], other[1]) for other in results[1:])
                rows.append(
                    {
                        "backend": name,
                        "dtype": str(dtype),
                        "tokens": tokens,
                        "error_out": errors[0],
                        "error_grad": errors[1],
                        "within": max(errors) <= tolerance,
                        "backward_repeats_bit_for_bit": repeats,
                    }
                )
    return rows


def main() -> int:
    """Measure all configurations in turn, and the accuracy."""
    parser = report.parser(__doc__, small="two images of 64 pixels, scale N and one step")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.small:
        vars(options).update(batch=2, steps=1, rounds=1)
    from yolov12.models.attention import _flash_attn_or_reason

    device = options.device
    found = _flash_attn_or_reason() if device == "cuda" else "flash-attn needs a GPU"
    variants = ["stock", "sdpa"] + ([] if isinstance(found, str) else ["flash"])

    def run(variant: str, deterministic: bool) -> dict[str, Any]:
        settings = {"variant": variant, "batch": options.batch, "deterministic": deterministic, "steps": options.steps}
        settings |= {"device": device, **(SMALL if options.small else {})}
        variables = {} if device == "cuda" else ONE_THREAD
        row: dict[str, Any] = Call("attention:step", stock=True, variables=variables, **settings).result()
        print(row, flush=True)
        return row

    runs = {
        f"{variant} {deterministic}": functools.partial(run, variant, deterministic)
        for deterministic in (False, True)
        for variant in variants
    }
    rounds = in_turn(runs, options.rounds)
    steps = [{"round": i, **row} for i, rows in enumerate(zip(*rounds.values(), strict=True)) for row in rows]
    ratios = [
        {
            "round": a["round"],
            "deterministic": a["deterministic"],
            "variant": a["variant"],
            "images_per_s_over_stock": a["images_per_s"] / b["images_per_s"],
            "peak_over_stock": a["peak_mib"] / b["peak_mib"] if a["peak_mib"] else None,
            "mb_per_image_over_stock": a["mb_per_image"] / b["mb_per_image"] if a["mb_per_image"] else None,
        }
        for a in steps
        for b in steps
        if a["variant"] != "stock" == b["variant"]
        and (a["round"], a["deterministic"]) == (b["round"], b["deterministic"])
    ]
    result = report.Report(
        options.out,
        device,
        flash_attn=found if isinstance(found, str) else __import__("flash_attn").__version__,
        ratios=ratios,
        steps=steps,
        accuracy=accuracy(device, SMALL_TOKENS if options.small else TOKENS),
    )
    result.write()
    print(json.dumps(ratios, indent=1))
    bad = [row for row in result["accuracy"] if not row["within"]]
    print(f"{len(result['accuracy'])} accuracy rows, {len(bad)} out of tolerance", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
