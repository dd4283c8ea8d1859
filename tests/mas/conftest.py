"""Helpers for tests of the engine: models, batches, planners that follow a script, and failing allocations."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel

from yolov12.mas.checkpointing.checkpointing import REBUILD, RECOMPUTE, Plan
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.modules import overridden
from yolov12.mas.oom import Failure
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.step.result import Result
from yolov12.mas.step.step import Step
from yolov12.training.adapter.detection import DetectionTask, criterion_of

GIB = 2**30
FAILURES: tuple[Callable[[], Exception], ...] = (
    lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: MemoryError(),
)


@dataclass(frozen=True)
class Fault:
    """Error at one place of one attempt to run a micro-batch."""

    attempt: int
    """Index of the attempt, from 0."""
    where: str
    """Place: `copy`, `preprocess`, `forward`, `assigner`, `loss` or `backward`."""
    module: int = 0
    """Index of the module, for `forward` and `backward`."""
    error: Callable[[], Exception] = FAILURES[0]
    """Makes the error."""


@dataclass
class Faults:
    """Raises each planned fault once."""

    plan: Sequence[Fault] = ()
    fired: list[Fault] = field(default_factory=list)
    attempt: int = -1

    def reset(self, plan: Sequence[Fault]) -> None:
        self.plan, self.fired, self.attempt = tuple(plan), [], -1

    def reach(self, where: str, module: int = 0) -> None:
        for fault in self.plan:
            if (fault.attempt, fault.where, fault.module) == (self.attempt, where, module) and fault not in self.fired:
                self.fired.append(fault)
                raise fault.error()


class Scripted:
    """Planner that splits between whole groups at random, in another way after every failure, with random levels."""

    def __init__(
        self,
        groups: Sequence[int],
        seed: int = 0,
        plans: Sequence[Sequence[tuple[int, ...]]] = (),
        levels: Sequence[int] = (0,),
    ) -> None:
        self._groups, self._random, self._plans = tuple(groups), random.Random(seed), list(plans)
        self.failures: list[Failure] = []
        self.level, self._levels = 0, levels

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        if failure is not None:
            self.failures.append(failure)
        self.level = self._random.choice(self._levels)
        if self._plans:
            return list(self._plans.pop(0))
        left, done = list(self._groups), 0
        while done < start:
            done += left.pop(0)
        assert done == start
        plan = []
        while left:
            count = self._random.randint(1, len(left))
            plan.append(tuple(left[:count]))
            del left[:count]
        return plan

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        pass


@dataclass
class Outcome:
    """Everything that a step changes."""

    gradient: Tensor
    """Gradients of all parameters in one vector, without the gradients that were there before."""
    result: Result
    buffers: dict[str, Tensor]
    drawn: Tensor
    """Next numbers of the random generator."""


class Bench:
    """A real model with Ultralytics' own loss, which can be run again and again from the same state.

    Preprocessing brightens each image by a random factor, so that a generator that is not set back after a failure
    shows in the gradient.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64, **task: Any) -> None:
        # A copy: all models share Ultralytics' one activation module, and hooks on it would outlive this.
        self.model = model = copy.deepcopy(model).to(dtype).train()
        self.dtype = dtype
        model.args = get_cfg()
        self.faults = Faults()
        self.task = _Task(self, **{"multi_scale": False, "overlapping_masks": True, **task})
        self.meter = ReplayMeter(80 * GIB, [0])
        self.layers = candidates(model)
        self.step = Step(model, self.task, self.meter, Tensor.backward, self.layers)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._state = copy.deepcopy(model.state_dict())
        self._hooks()

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.faults.reach("preprocess")
        images = batch["img"].to(self.dtype) / 255
        factor = torch.rand(len(images), 1, 1, 1, dtype=torch.float64)
        self.faults.reach("preprocess", 1)
        return {**batch, "img": images * (0.9 + 0.2 * factor).to(self.dtype)}

    def reset(self, faults: Sequence[Fault] = (), before: bool = False) -> None:
        """Restore the initial state; with `before`, parameters have gradients as from an earlier batch."""
        self.model.load_state_dict(self._state)
        for parameter in self.parameters:
            parameter.grad = parameter.detach() * 0.5 if before else None
        torch.manual_seed(3)
        self.faults.reset(faults)

    def run(
        self, batch: dict[str, Any], planner: Any = None, faults: Sequence[Fault] = (), before: bool = False
    ) -> Outcome:
        """Run a batch; by default at once and as one group."""
        self.reset((), before)
        images = self.task.workload(batch).images
        self.faults.reset(faults)
        result = self.step.run(batch, images, planner or Scripted((), plans=[[(images,)]]))
        return self.outcome(result, before)

    def whole(self, batch: dict[str, Any], group: int) -> Outcome:
        """Run a batch at once, in groups of `group` images."""
        groups = split_groups(len(batch["img"]), group)
        return self.run(batch, Scripted(groups, plans=[[groups]]))

    def plain(self, batch: dict[str, Any], groups: Sequence[int] = ()) -> Outcome:
        """Run a batch as Ultralytics does; with `groups`, BatchNorm layers normalise each of them."""

        def forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
            parts = [
                nn.functional.batch_norm(part, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
                for part in x.split(groups)
            ]
            return torch.cat(parts)

        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)] if groups else []
        self.reset()
        with overridden({norm: partial(forward, norm) for norm in norms}):
            loss, items = self.model(self.preprocess(batch))
        loss.sum().backward()
        return self.outcome(Result(loss.detach(), items, (len(batch["img"]),), self.meter.stopwatch()))

    def outcome(self, result: Result, before: bool = False) -> Outcome:
        """Collect the outcome of a step."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad - p.detach() * 0.5 if before else p.grad
            for p in self.parameters
        ]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return Outcome(torch.cat([gradient.flatten() for gradient in gradients]), result, buffers, torch.rand(4))

    def _hooks(self) -> None:
        modules = [module for module in self.model.modules() if not list(module.children())]
        for index, module in enumerate(modules):

            def after(module: nn.Module, inputs: Any, output: Any, index: int = index) -> None:
                self.faults.reach("forward", index)
                if isinstance(output, Tensor) and output.requires_grad and self.faults.plan:
                    output.register_hook(lambda gradient: self.faults.reach("backward", index))

            module.register_forward_hook(after)
        self.modules = len(modules)
        for head in self.heads():
            match, loss = head.assigner.get_pos_mask, head.bce.forward
            head.assigner.get_pos_mask = self._reaching("assigner", match)
            head.bce.forward = self._reaching("loss", loss)

    def heads(self) -> list[Any]:
        """Return the parts of the criterion that have an assigner: two for an end-to-end model."""
        criterion = criterion_of(self.model)
        return [criterion] if hasattr(criterion, "assigner") else [criterion.one2many, criterion.one2one]

    def _reaching(self, place: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def reaching(*args: Any, **kwargs: Any) -> Any:
            self.faults.reach(place)
            return call(*args, **kwargs)

        return reaching


class _Task(DetectionTask):
    def __init__(self, bench: Bench, **options: Any) -> None:
        super().__init__(bench.preprocess, **options)
        self._faults = bench.faults

    def part(self, batch: Any, start: int, stop: int) -> dict[str, Any]:
        self._faults.attempt += 1
        self._faults.reach("copy")
        return super().part(batch, start, stop)


def make_batch(boxes: Sequence[int], seed: int = 0, angles: bool = False, size: int = 64) -> dict[str, Any]:
    """Make a batch in the form of Ultralytics' data loader: noise images, with `boxes` boxes in each image."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(boxes)
    placed = torch.rand(count, 4, generator=draw) * torch.tensor([0.8, 0.8, 0.5, 0.5]) + torch.tensor(
        [0.1, 0.1, 0.05, 0.05]
    )
    if angles:
        placed = torch.cat((placed, torch.rand(count, 1, generator=draw) * 1.5), 1)
    return {
        "img": torch.randint(0, 256, (len(boxes), 3, size, size), generator=draw, dtype=torch.uint8),
        "batch_idx": torch.arange(len(boxes)).repeat_interleave(torch.tensor(boxes)).float(),
        "cls": torch.randint(0, 5, (count, 1), generator=draw).float(),
        "bboxes": placed,
        "im_file": tuple(f"{index}.jpg" for index in range(len(boxes))),
    }


def make_batch_for(name: str, boxes: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Make a batch for one of `HEADS`: with angles, with random masks of 16 x 16, or with 17 keypoints an object."""
    kind = HEADS[name][0]
    batch, draw = make_batch(boxes, seed, angles=kind == "obb"), torch.Generator().manual_seed(seed + 1)
    if kind == "segment":
        images = [torch.randint(0, count + 1, (16, 16), generator=draw) for count in boxes]  # the object of each pixel
        apart = torch.randint(0, 2, (sum(boxes), 16, 16), generator=draw)
        batch["masks"] = (apart if name == "masks apart" else torch.stack(images)).to(torch.uint8)
        batch["sem_masks"] = torch.randint(0, 5, (len(boxes), 16, 16), generator=draw).to(torch.uint8)
    elif kind == "pose":
        points = torch.rand(sum(boxes), 17, 3, generator=draw)
        points[..., 2] = (points[..., 2] > 0.4).float()  # which are visible
        batch["keypoints"] = points[..., :2] if name == "keypoints without visibility" else points
    return batch


def random_plan(layers: dict[str, nn.Module], seed: int) -> Plan:
    """Return a plan with a random mode for about half of a model's layers, none inside another."""
    chance = random.Random(seed)
    names = list(layers)
    chance.shuffle(names)
    chosen: dict[str, str] = {}
    for name in names:
        apart = not any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in chosen)
        if apart and chance.random() < 0.5:
            chosen[name] = chance.choice((REBUILD, RECOMPUTE))
    return Plan(tuple(chosen.items()))


def build(kind: str, cfg: Any, **options: Any) -> nn.Module:
    """Build a model whose head is not freshly initialised: it finds objects, with scores of all sizes."""
    classes = {"detect": DetectionModel, "obb": OBBModel, "segment": SegmentationModel, "pose": PoseModel}
    torch.manual_seed(0)
    model = classes[kind](cfg, nc=5, verbose=False, **options)
    with torch.no_grad():
        for name in ("cv3", "one2one_cv3"):
            for scores in getattr(model.model[-1], name, None) or ():
                scores[-1].bias.uniform_(-4.0, 0.0)
    return model


HEADS: Mapping[str, tuple[str, str, list[Any], dict[str, Any]]] = {
    "masks": ("segment", "Segment", ["nc", 32, 16], {}),
    "masks apart": ("segment", "Segment", ["nc", 32, 16], {}),
    "keypoints": ("pose", "Pose", ["nc", "kpt_shape"], {"kpt_shape": [17, 3]}),
    "keypoints without visibility": ("pose", "Pose", ["nc", "kpt_shape"], {"kpt_shape": [17, 2]}),
    "two heads": ("detect", "v10Detect", ["nc"], {}),
    "masks of two heads": ("segment", "Segment26", ["nc", 32, 16], {"end2end": True, "reg_max": 1}),
    "keypoints of two heads": (
        "pose", "Pose26", ["nc", "kpt_shape"], {"kpt_shape": [17, 3], "end2end": True, "reg_max": 1},
    ),
    "oriented boxes": ("obb", "OBB", ["nc", 1], {}),
    "oriented boxes of two heads": ("obb", "OBB26", ["nc", 1], {"end2end": True, "reg_max": 1}),
}  # fmt: skip
"""Name → task, head, arguments of the head, and further entries of the yaml."""


def small_bench(name: str, dtype: torch.dtype = torch.float64) -> Bench:
    """Return a bench with a small model with one of `HEADS`."""
    kind, head, arguments, more = HEADS[name]
    layers = [[-1, 1, "Conv", [8, 3, 2]]] * 2 + [[-1, 1, "C2f", [16]]] + [[-1, 1, "Conv", [16, 3, 2]]] * 3
    cfg = {**more, "nc": 5, "backbone": layers, "head": [[[3, 4, 5], 1, head, arguments]]}
    bench = Bench(build(kind, cfg), dtype, overlapping_masks=name != "masks apart")
    for each in bench.heads():
        each.overlap = name != "masks apart"
    return bench


def difference(one: Tensor, other: Tensor) -> float:
    """Return the relative difference of two vectors as a whole: single entries may consist only of rounding errors.

    An example is the gradient of a convolution's bias before BatchNorm.
    """
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """Return the helpers of this module."""
    return SimpleNamespace(
        Bench=Bench,
        FAILURES=FAILURES,
        Fault=Fault,
        Scripted=Scripted,
        batch=make_batch,
        batch_for=make_batch_for,
        plan=random_plan,
        build=build,
        small_bench=small_bench,
        difference=difference,
    )
