"""Exported graphs that are split to fit: same boxes, planned memory, engines that build. Needs no GPU.

    python -m benchmarks export --out benchmarks/results/export.json          (about half an hour on two cores)
    python -m benchmarks export --out part.json --only rtx dynamic hopeless

agree     n, s, m, l, x at 640 and m, x at 1280, static and dynamic, split to a half or three quarters of their peak:
          boxes and scores of two photographs against the unsplit graph in onnxruntime, and the planned peak against a
          run node by node
rtx       TensorRT-RTX: workspace limits under which YOLOv12-M at 1280 and YOLOv12-X at 640 and 1280 build
dynamic   TensorRT-RTX: the smallest workspace in which YOLOv12-N for images up to 1280 builds, unsplit and split
hopeless  seconds until a graph that cannot get small enough is refused, or a builder that cannot build it gives up

Weights are random from a seed, and BatchNorm is calibrated on the photographs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import node_by_node
from benchmarks.common import report

MIB = 2**20
MODELS = [(scale, 640) for scale in "nsmlx"] + [("m", 1280), ("x", 1280)]
SHARES = {False: (1.0, 0.5), True: (1.0, 0.75)}  # fractions of the unsplit peak, by whether the graph is dynamic


def images(height: int, width: int) -> np.ndarray:
    """Return two photographs, (2, 3, height, width), from 0 to 1."""
    import cv2
    from ultralytics.utils import ASSETS

    pictures = [cv2.resize(cv2.imread(str(ASSETS / name)), (width, height)) for name in ("bus.jpg", "zidane.jpg")]
    return np.ascontiguousarray(np.stack(pictures)[..., ::-1].transpose(0, 3, 1, 2), np.float32) / 255


def exported(scale: str, size: int, dynamic: bool, folder: Path) -> Path:
    """Export a YOLOv12 to ONNX, with activations as large as those of a trained model; return the file."""
    import torch

    from yolov12 import YOLO

    os.chdir(folder)
    torch.manual_seed(0)
    model = YOLO(f"yolov12{scale}.yaml")
    with torch.no_grad():
        model.model.train()
        for _ in range(10):
            model.model(torch.from_numpy(images(320, 320)))
        model.model.eval()
        for branch in model.model.model[-1].cv3:
            branch[-1].bias.zero_()  # scores are about 0.5 instead of 1e-5 as at the start of a training
    file = model.export(format="onnx", imgsz=size, dynamic=dynamic, verbose=False)
    return Path(file).rename(f"{scale}{size}{'d' if dynamic else 's'}.onnx").resolve()


def run(file: Path, image: np.ndarray) -> tuple[np.ndarray, float]:
    """Run a graph; return its output and the seconds taken."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    (found,) = session.run(None, {"images": image})
    return found, time.perf_counter() - start


def agree(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, size and limit."""
    import onnx_ir as ir

    from yolov12.errors import DoesNotFitError
    from yolov12.export import graph
    from yolov12.export.rewrite import split
    from yolov12.export.shapes import Shapes

    for scale, size in MODELS:
        for dynamic in (False, True):
            file = exported(scale, size, dynamic, folder)
            model = graph.load(file)
            shape = (1, 3, size, size)
            most = graph.input_shapes(model, shape)
            least = graph.input_shapes(model, (1, 3, 32, 32))
            photographs = images(size, size)
            whole = graph.plan(model, Shapes(model, most))
            found, seconds = zip(*(run(file, image[None]) for image in photographs), strict=True)
            measured = node_by_node.peak(file, photographs[:1])
            for share in SHARES[dynamic]:
                row = {"model": f"yolov12{scale}", "imgsz": size, "dynamic": dynamic, "share": share}
                start = time.perf_counter()
                try:
                    done = split(model, int(share * whole.peak_bytes), most, least)
                except DoesNotFitError as error:
                    yield {**row, "problem": str(error), "split_s": round(time.perf_counter() - start, 1)}
                    continue
                row["split_s"] = round(time.perf_counter() - start, 1)
                cut = file
                if done.sites:
                    cut = folder / "cut.onnx"
                    ir.save(done.model, cut)
                    measured = node_by_node.peak(cut, photographs[:1])
                again, slower = zip(*(run(cut, image[None]) for image in photographs), strict=True)
                off = np.abs(np.concatenate(again) - np.concatenate(found)).max(axis=(0, 2))
                yield {
                    **row,
                    "planned_bytes": done.plan.peak_bytes,
                    "measured_bytes": measured,
                    "planned_of_measured": round(done.plan.peak_bytes / measured, 4),
                    "boxes_off_pixels": float(off[:4].max()),
                    "scores_off": float(off[4:].max()),
                    "highest_score": float(np.concatenate(found)[:, 4:].max()),
                    "seconds_of_uncut": round(sum(slower) / sum(seconds), 2),
                    "cuts": done.describe(),
                }
            file.unlink()


def rtx(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each build."""
    import onnx_ir as ir

    from yolov12.export import engine, graph
    from yolov12.export.budget import workspace_for
    from yolov12.export.rewrite import split
    from yolov12.export.shapes import Shapes

    library = engine.find("tensorrt_rtx")

    def build(name: str, file: Path, size: int, workspace: int, plan: graph.MemoryPlan) -> dict[str, Any]:
        job = engine.Job(file, folder / "built.engine", (1, 3, size, size))
        (attempt,) = engine.build(library, job, workspace, engine.EFFORTS[:1])
        return {"model": name, "imgsz": size, "tensors_bytes": plan.peak_bytes, **attempt.as_dict()}

    for scale, size, limits in (("m", 1280, (256,)), ("x", 640, ()), ("x", 1280, ())):
        file = exported(scale, size, False, folder)
        model = graph.load(file)
        most = graph.input_shapes(model, (1, 3, size, size))
        whole = graph.plan(model, Shapes(model, most))
        name = f"yolov12{scale}"
        if limits:
            yield build(f"{name}, uncut", file, size, 512 * MIB, whole)
        for share in (1.0, 0.75, 0.5):
            done = split(model, int(share * whole.peak_bytes), most)
            ir.save(done.model, folder / "cut.onnx")
            yield build(f"{name}, cut to {share:g}", folder / "cut.onnx", size, workspace_for(done.plan), done.plan)
        for limit in limits:
            fixed = workspace_for(whole) - whole.peak_bytes
            done = split(model, limit * MIB - fixed, most)
            ir.save(done.model, folder / "cut.onnx")
            yield build(f"{name}, cut for {limit} MiB", folder / "cut.onnx", size, limit * MIB, done.plan)
        file.unlink()


def dynamic(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each split; the workspace is found by bisection to 4 MiB."""
    import onnx_ir as ir

    from yolov12.export import engine, graph
    from yolov12.export.rewrite import split

    library = engine.find("tensorrt_rtx")
    file = exported("n", 640, True, folder)
    model = graph.load(file)
    least, most = (graph.input_shapes(model, (1, 3, size, size)) for size in (32, 1280))
    for limit in (None, 150, 100, 61):
        done = split(model, (limit or 1 << 20) * MIB, most, least)
        ir.save(done.model, folder / "cut.onnx")
        job = engine.Job(folder / "cut.onnx", folder / "built.engine", (1, 3, 640, 640), dynamic=True)
        low, high = 0, 1024
        while high - low > 4:
            middle = (low + high) // 2
            (attempt,) = engine.build(library, job, middle * MIB, engine.EFFORTS[:1])
            low, high = (low, middle) if attempt.outcome == "built" else (middle, high)
        yield {
            "limit_mib": limit,
            "tensors_bytes": done.plan.peak_bytes,
            "workspace_mib": high,
            "cuts": done.describe(),
        }


def hopeless(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each graph and each build."""
    from yolov12 import YOLO
    from yolov12.errors import DoesNotFitError
    from yolov12.export import graph
    from yolov12.export.rewrite import split

    for scale, size, limit in (("n", 640, 3), ("x", 640, 20), ("x", 1280, 100)):
        model = graph.load(exported(scale, size, False, folder))
        start = time.perf_counter()
        try:
            split(model, limit * MIB, graph.input_shapes(model, (1, 3, size, size)))
        except DoesNotFitError as error:
            seconds = round(time.perf_counter() - start, 1)
            yield {
                "model": f"yolov12{scale}",
                "imgsz": size,
                "limit_mib": limit,
                "seconds": seconds,
                "error": str(error),
            }
    # Enough according to the plan, but not for TensorRT-RTX.
    for scale, limit in (("n", "150MiB"), ("m", "400MiB")):
        start = time.perf_counter()
        try:
            YOLO(f"yolov12{scale}.yaml").export(
                format="engine", engine_builder="tensorrt_rtx", dynamic=True, mem_limit=limit, verbose=False
            )
            error_text = ""
        except DoesNotFitError as error:
            error_text = str(error)
        seconds = round(time.perf_counter() - start, 1)
        yield {
            "model": f"yolov12{scale}, dynamic, export and all",
            "limit": limit,
            "seconds": seconds,
            "error": error_text,
        }


PARTS = {"agree": agree, "rtx": rtx, "dynamic": dynamic, "hopeless": hopeless}


def main() -> None:
    """Run the parts, and write each row to the file at once."""
    options = report.parser(__doc__, parts=PARTS).parse_args()
    versions = {name: metadata.version(name) for name in ("torch", "onnxruntime", "onnx", "onnx-ir")}
    result = report.Report(options.out, "cpu", keep=True, versions=versions)
    from yolov12 import autopatch

    autopatch.apply()
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            rows: list[dict[str, Any]] = []
            for row in PARTS[name](Path(folder)):
                print({key: value for key, value in row.items() if key != "cuts"}, flush=True)
                rows.append(row)
                result.add(name, rows)


if __name__ == "__main__":
    main()
