"""One of several processes that share batches: `python rank.py FOLDER`, with its rank in the environment.

It reads one case per line from standard input, runs its share of that batch, saves the outcome in the folder, and then
prints `done`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from yolov12.errors import DoesNotFitError
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL
from yolov12.mas.distributed import ranks as ranks_module
from yolov12.mas.distributed.ranks import ProcessRanks, RankStatus, exchange_names
from yolov12.mas.distributed.replicas import checksum
from yolov12.mas.distributed.watchdog import Watchdog, connect
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.step.step import Step
from yolov12.mas.task import Share

_spec = importlib.util.spec_from_file_location("mas_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
tools: Any = importlib.util.module_from_spec(_spec)
sys.modules["mas_conftest"] = tools
_spec.loader.exec_module(tools)


def steady(bench: Any) -> Any:
    """Preprocess without random brightness, as ranks draw random numbers separately."""
    bench.preprocess = lambda batch: {**batch, "img": batch["img"].to(bench.dtype) / 255}
    bench.task.preprocess = lambda batch: (bench.faults.reach("preprocess"), bench.preprocess(batch))[1]
    return bench


def raising(error: Exception) -> Any:
    def plan(start: int, failure: Any) -> Any:
        raise error

    return plan


def run(bench: Any, ranks: ProcessRanks, case: dict[str, Any]) -> dict[str, Any]:
    """Run this rank's share of a case."""
    name = case.get("head")
    batch = (
        tools.make_batch_for(name, case["boxes"], case["seed"])
        if name
        else tools.make_batch(case["boxes"], case["seed"])
    )
    groups = split_groups(len(case["boxes"]), case["group"])
    before, own = (sum(case["groups"][: ranks.rank + place]) for place in (0, 1))
    start, stop = sum(groups[:before]), sum(groups[:own])
    counts = stop > start
    mine = groups[before:own] if counts else (1,)
    if not counts:  # then the rank runs one padding image
        start, stop = 0, 1
    bench.faults.reset(())
    bench.task.workload(batch)
    share = {name: value for name, value in bench.task.part(batch, start, stop).items() if name != "yolov12_boxes"}
    faults = [tools.Fault(*place, tools.FAILURES[error]) for *place, error in case["faults"][ranks.rank]]
    bench.step.plans = (KEEP_ALL, tools.random_plan(bench.layers, case["seed"]))
    planner = tools.Scripted(mine, case["seed"] + ranks.rank, levels=(0, 1))
    bench.reset((), case["before"])
    images = bench.task.workload(share).images
    bench.faults.reset(faults)
    if trouble := case.get("troubles", {}).get(str(ranks.rank)):
        kind, words = trouble
        planner.plan = raising({"fit": DoesNotFitError, "other": ValueError}[kind](words))
    if case.get("flip") == ranks.rank:
        next(bench.model.parameters()).data.view(-1)[7] += 1e-12
    status = RankStatus(checksum=checksum([*bench.model.parameters(), *bench.model.buffers()]) if "flip" in case else 0)
    result = bench.step.run(share, images, planner, Share(len(case["boxes"]), is_padding=not counts), status)
    outcome = bench.outcome(result, case["before"])
    return {
        "checksum": checksum([*bench.model.parameters(), *bench.model.buffers()]),
        "gradient": outcome.gradient,
        "buffers": outcome.buffers,
        "loss": result.loss,
        "items": dict(result.items),
        "micro_batches": result.micro_batches if counts else (),
        "failures": len(planner.failures),
    }


def bench_for(head: str | None, benches: dict[Any, Any], ranks: ProcessRanks) -> Any:
    """Return a bench with a head of `HEADS`, or with YOLOv12-N; each is made once."""
    if head not in benches:
        bench = steady(tools.small_bench(head) if head else tools.Bench(tools.build("detect", "yolov12n.yaml")))
        bench.step = Step(bench.model, bench.task, bench.meter, torch.Tensor.backward, bench.layers, ranks=ranks)
        benches[head] = bench
    return benches[head]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks_module.BUCKET_BYTES = 2**22  # so that gradients of a small model fill several
    dist.init_process_group("gloo")
    # No rank dies here, and on a busy machine none shall be taken for dead.
    watchdog = Watchdog(connect(), dist.get_rank(), dist.get_world_size(), names=exchange_names(), dead_s=600)
    ranks = ProcessRanks(watchdog)
    benches: dict[Any, Any] = {}
    for index, line in enumerate(sys.stdin):
        try:
            case = json.loads(line)
            found = run(bench_for(case.get("head"), benches, ranks), ranks, case)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        if "gradient" in found:
            found["gradient_sum"] = float(found["gradient"].sum())
            if ranks.rank:
                del found["gradient"]
        torch.save(found, folder / f"{index}.{ranks.rank}.pt")
        print("done", flush=True)
    watchdog.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
