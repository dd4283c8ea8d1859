"""`yolov12 plan model=yolov12m.yaml format=onnx imgsz=1280` plans the memory of an exported graph and how to split it.

model=yolov12x.yaml     a model yaml, a weight file or an .onnx file
batch=1 imgsz=640       as in an export; with dynamic=True up to twice imgsz, as Ultralytics builds engines
mem=256MiB              limit for weights, inputs, tensors and the builder; without a limit nothing is split
--json                  print JSON

The exit status is 0 if the graph fits, 1 if it does not, and 2 if an argument or the model cannot be used.
Tensors are counted in FP32, the precision of the graph.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import graph
from yolov12.export.budget import smallest_and_largest, tensors_limit, workspace_for
from yolov12.export.graph import MemoryPlan
from yolov12.export.rewrite import Split, Splitter
from yolov12.plan.words import parse_count, parse_switch, parse_words
from yolov12.sizes import parse_memory_size

__all__ = ["main"]

_DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "format": "onnx",
    "imgsz": 640,
    "batch": 1,
    "dynamic": False,
    "mem": None,
    "json": False,
}


def main(words: Sequence[str]) -> tuple[str, int]:
    """Plan an exported graph.

    Args:
        words: The words after `yolov12 plan`.

    Returns:
        The text to print, and the exit status: 0 if the graph fits or there is no limit, else 1.

    Raises:
        ConfigError: An argument is unknown, malformed or missing.
    """
    given = parse_words(words, _DEFAULTS, switches=("json", "dynamic"))
    if given["model"] is None:
        raise ConfigError("no model= given. Give a yaml, a weight file or an .onnx file, as in model=yolov12m.yaml")
    if given["format"] not in ("onnx", "engine"):
        raise ConfigError(
            f"format={given['format']}: plans are made for onnx, and for engine, which has the same graph"
        )
    size = parse_count("imgsz", given["imgsz"], 640)
    shape = (parse_count("batch", given["batch"], 1), 3, size, size)
    dynamic, as_json = parse_switch("dynamic", given["dynamic"]), parse_switch("json", given["json"])
    limit = parse_memory_size(given["mem"], "mem")
    if isinstance(limit, float):
        raise ConfigError(f"mem={given['mem']} is a fraction of a card. Give bytes, as in mem=256MiB")
    with tempfile.TemporaryDirectory() as folder:
        model = graph.load(_exported(given["model"], shape, dynamic, Path(folder)))
        least, most = (graph.input_shapes(model, each) for each in smallest_and_largest(shape, dynamic))
        splitter = Splitter(model, most, least)
        split, problem = None, ""
        if limit is not None:
            try:
                split = splitter.split(tensors_limit(splitter.whole, limit))
            except DoesNotFitError as error:
                problem = str(error)
    facts = _facts(given["model"], next(iter(most.values())), splitter.whole, limit, split, problem)
    return json.dumps(facts, indent=2) if as_json else _text(facts), int(bool(problem))


def _exported(name: str, shape: Sequence[int], dynamic: bool, folder: Path) -> Path:
    """Return an ONNX file: the one that is named, or one that is exported into a folder."""
    if name.endswith(".onnx"):
        return Path(name)
    from yolov12 import YOLO  # not before it is needed: an ONNX file is planned without torch

    if Path(name).is_file():  # Ultralytics writes the export to the folder of the weights
        link = folder / Path(name).name
        link.symlink_to(Path(name).resolve())
        name = str(link)
    model = YOLO(name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        exported = model.export(format="onnx", imgsz=shape[2], batch=shape[0], dynamic=dynamic, verbose=False)
    finally:
        os.chdir(before)
    return folder / str(exported)


def _facts(
    name: str, shape: Sequence[int], whole: MemoryPlan, limit_bytes: int | None, split: Split | None, problem: str
) -> dict[str, Any]:
    facts = {"model": name, "input": list(shape), "limit_bytes": limit_bytes, "unsplit": _facts_of_plan(whole)}
    if split is not None:
        facts["split"] = {**_facts_of_plan(split.plan), "splits": split.describe()}
    return {**facts, "fits": not problem, "problem": problem}


def _facts_of_plan(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "weights_bytes": plan.weights_bytes,
        "inputs_bytes": plan.inputs_bytes,
        "tensors_bytes": plan.peak_bytes,
        "builder_bytes": workspace_for(plan),
        "node": plan.node.name,
        "largest": {str(value.name): size for value, size in plan.live[:4]},
    }


def _text(facts: Mapping[str, Any]) -> str:
    columns = {"unsplit": facts["unsplit"], **({"split": facts["split"]} if "split" in facts else {})}
    rows = {"weights": "weights", "inputs": "inputs", "tensors": "tensors at the peak", "builder": "a builder needs"}
    lines = [f"{facts['model']} as an ONNX graph, input {'x'.join(map(str, facts['input']))}, FP32", ""]
    lines.append(f"{'MiB':22}" + "".join(f"{name:>10}" for name in columns))
    for key, label in rows.items():
        lines.append(f"{label:22}" + "".join(f"{each[f'{key}_bytes'] / 2**20:10,.1f}" for each in columns.values()))
    for name, each in columns.items():
        lines += ["", f"peak, {name}: {each['node']}"]
        lines += [f"  {size / 2**20:8,.1f}  {tensor}" for tensor, size in each["largest"].items()]
    if "split" in facts:
        lines += ["", *(facts["split"]["splits"] or ["It fits as it is: nothing is split."])]
    if facts["problem"]:
        lines += ["", f"It does not fit: {facts['problem']}"]
    return "\n".join(lines)
