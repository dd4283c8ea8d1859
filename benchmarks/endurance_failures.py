"""Part `failures` of benchmarks/endurance.py: allocations that fail anywhere in a step, in ours and in stock."""

from __future__ import annotations

import collections
import gc
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.processes import GIB, shared_out
from benchmarks.endurance_model import TINY, drawn, training, yaml_of
from yolov12.errors import DoesNotFitError

GROUP, IMAGES = 2, 16
STEPS = 100  # of a round in float64


class Draws:
    """Draws which allocations of a step fail: one, or in a tenth of the steps two, anywhere, also in a repetition.

    Args:
        seed: Seed of the draws.
        allocations: Number of allocations of a step; many while it is not known, so that none fails in a first step.
    """

    def __init__(self, seed: int, allocations: int = 20_000) -> None:
        self._chance, self.allocations = random.Random(seed), allocations

    def draw(self) -> list[int]:
        """Return the indices of the allocations that fail."""
        return [self._chance.randrange(self.allocations) for _ in range(1 + (self._chance.random() < 0.1))]


def exact(failures: int, seconds: float, seed: int = 0, device: str = "cpu", model: str = "tiniest") -> dict[str, Any]:
    """Run steps of the engine in float64 with failures, and the same steps without, and compare the weights.

    Each round makes a model of the same weights and trains it on the same batches with SGD. A run without failures that
    begins with one weight moved by a rounding error shows how far such errors carry in these steps. On the CPU, the
    engine is told of a simulated card's memory, as reading that of the machine would take most of the time.

    Args:
        failures: Failures to inject.
        seconds: Time after which no further round begins, from the end of the steps without failures.
        seed: Seed of the draws.
        device: `cpu` or `cuda`.
        model: See `endurance_model.yaml_of`.
    """
    from benchmarks.common.allocations import limit_allocator

    limit_allocator(device)
    found, differences = _Sums(), list[float]()
    start, calm = _float64_run(model, device, None, found)
    _, moved = _float64_run(model, device, None, found, is_moved=True)
    begun = time.monotonic()
    for number in itertools.count():
        if found["injected"] >= failures or time.monotonic() - begun > seconds:
            break
        before = found["steps_in_smaller_groups"]
        _, disturbed = _float64_run(model, device, Draws(seed + number), found)
        if found["steps_in_smaller_groups"] > before:
            found["rounds_in_smaller_groups"] += 1  # another calculation, see docs/explanation/exactness.md
            continue
        differences.append(_difference(disturbed, calm, start))
        print(f"exact, round {number}: {found['injected']} failures, difference {differences[-1]:.1e}", flush=True)
    found["steps_of_a_round"], found["rounds_compared"] = STEPS, len(differences)
    return {
        **found.as_dict(),
        "model": model,
        "dtype": "float64",
        "largest_difference_of_weights": max(differences, default=None),
        "difference_by_a_rounding_error": _difference(moved, calm, start),
        "bit_equal_rounds": differences.count(0.0),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _difference(weights: Any, calm: Any, start: Any) -> float:
    """Return the difference of weights, as a fraction of the distance that training moved them."""
    return float((weights - calm).norm() / (calm - start).norm())


def _float64_run(
    model: str, device: str, draws: Draws | None, found: _Sums, *, is_moved: bool = False
) -> tuple[Any, Any]:
    """Train a model, and return its weights before and after as vectors.

    Args:
        model: See `endurance_model.yaml_of`.
        device: `cpu` or `cuda`.
        draws: What fails; None for nothing.
        found: Sums to add to.
        is_moved: Whether the first weight begins a rounding error larger.
    """
    import torch

    from benchmarks.common.allocations import FailingAllocations
    from benchmarks.common.model import random_batch, task
    from yolov12 import autopatch, mas
    from yolov12.mas.memory.replay import ReplayMeter

    autopatch.apply()
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    detector = DetectionModel(yaml_of(model), nc=80, verbose=False).double().to(device)
    detector.train().args = DEFAULT_CFG
    with torch.no_grad():
        for scores in detector.model[-1].cv3:
            scores[-1].bias.uniform_(-4.0, 0.0)  # a model that finds objects, with scores of all sizes
        if is_moved:
            next(detector.parameters()).view(-1)[0] *= 1 + 2**-52
    of_fp32 = task(device)
    stock = of_fp32.preprocess
    of_fp32.preprocess = lambda part: {**(ready := stock(part)), "img": ready["img"].double()}
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5, momentum=0.9, nesterov=True)
    batches = [random_batch(IMAGES, 64, 5) for _ in range(4)]
    mode, folder = FailingAllocations(device), Path(tempfile.mkdtemp())
    config = mas.Config(bn_group=GROUP)
    meter = ReplayMeter(16 * GIB, [0]) if device == "cpu" else None
    journal, silent = mas.Journal(folder), (lambda line: None)
    engine = mas.Engine(detector, of_fp32, config, meter=meter, journal=journal, log=silent)
    start = _weights(detector)
    gc.collect()
    gc.freeze()  # the engine collects garbage after each failure
    for step in range(STEPS):
        mode.reset(draws.draw() if draws else ())
        try:
            with mode if draws else nullcontext():
                engine.step(batches[step % len(batches)])
        except DoesNotFitError:
            found["runs_that_ended"] += 1
            break
        if draws and not mode.injected:
            draws.allocations = mode.count  # none failed, so this is what a step has
        found.injected(mode.injected)
        if step:
            engine.update(optimizer)
        else:
            mode.reset(draws.draw() if draws else ())
            with mode if draws else nullcontext():
                engine.update(optimizer)
            found.injected(mode.injected)
    summary = engine.close(updates_expected=STEPS)
    if draws is not None:
        found.add(summary.__dict__)
        found["wanted_images"] += STEPS * IMAGES
        found["steps_in_smaller_groups"] += (folder / "memory.csv").read_text().count("groups of")
    return start, _weights(detector)


def _weights(model: Any) -> Any:
    import torch

    return torch.cat([parameter.detach().double().flatten().cpu() for parameter in model.parameters()])


class _Sums(collections.Counter[str]):
    """Sums over runs of what was injected, and of what the summary of each run counts."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def injected(self, operations: list[str]) -> None:
        """Add failures, by the operation that failed."""
        self["injected"] += len(operations)
        self["disturbed_steps"] += bool(operations)
        self.operations.update(operations)

    def add(self, summary: dict[str, Any]) -> None:
        """Add the figures of a run's own summary."""
        self["counted"] += summary["out_of_memories"]
        for name in ("updates", "updates_expected", "images", "images_lost", "retries", "shrinks"):
            self[name] += summary[name]

    def as_dict(self) -> dict[str, Any]:
        """Return the sums, and the operations of PyTorch that failed."""
        named = ("injected", "counted", "images_lost", "runs_that_ended", "rounds_in_smaller_groups")
        return {**self, **{name: self[name] for name in named}, "operations": sorted(self.operations)}


def trainings(failures: int, seconds: float, seed: int = 0, device: str = "cpu", **arguments: Any) -> dict[str, Any]:
    """Train with Ultralytics' trainer and the engine, with failures in every step, from the first warm-up on.

    Args:
        failures: Failures to inject.
        seconds: Time after which no further training begins.
        seed: Seed of the draws.
        device: `cpu` or `cuda`.
        arguments: Arguments of the training.
    """
    from benchmarks.common.allocations import limit_allocator

    limit_allocator(device)
    begun, found = time.monotonic(), _Sums()
    for number in itertools.count():
        if found["injected"] >= failures or time.monotonic() - begun > seconds:
            break
        try:
            with _failing_engine(device, Draws(seed + number), found):
                folder = training(device=device, seed=number, **arguments)
        except DoesNotFitError:
            found["runs_that_ended"] += 1
            continue
        found.add(json.loads((folder / "memory.json").read_text()))
        found["trainings"] += 1
        print(f"trainings: {found['injected']} failures, {found['counted']} counted", flush=True)
    return {**found.as_dict(), "trainer": "Ultralytics", "seconds": round(time.monotonic() - begun, 1)}


@contextmanager
def _failing_engine(device: str, draws: Draws, found: _Sums) -> Iterator[None]:
    """Let allocations fail in the steps of all engines, and in the first update of each."""
    from benchmarks.common.allocations import FailingAllocations
    from yolov12.mas import Engine

    mode, stock_step, stock_update = FailingAllocations(device), Engine.step, Engine.update

    def failing(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode.reset(draws.draw())
        with mode:
            result = call(*args, **kwargs)
        if not mode.injected:
            draws.allocations = mode.count
        found.injected(mode.injected)
        return result

    def step(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        return failing(stock_step, engine, *args, **kwargs)

    def update(engine: Engine, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if optimizer.state:  # later updates use memory that the step before has freed
            stock_update(engine, optimizer, *args, **kwargs)
        else:
            failing(stock_update, engine, optimizer, *args, **kwargs)

    Engine.step, Engine.update = step, update  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Engine.step, Engine.update = stock_step, stock_update  # type: ignore[method-assign]


def stock(runs: int, seed: int = 0, device: str = "cpu", **arguments: Any) -> dict[str, Any]:
    """Train with stock Ultralytics, with one failure in each training, in its second epoch.

    The first step of that epoch is counted. The failure is drawn over the allocations of such a step, and comes in the
    next step that has as many.

    Args:
        runs: Number of trainings.
        seed: Seed of the draws.
        device: `cpu` or `cuda`.
        arguments: Arguments of the training.
    """
    import torch

    found = collections.Counter[str]()
    for number in range(runs):
        failure = _OneFailure(device, random.Random(f"{seed}, {number}"))
        callbacks = {"on_train_batch_start": failure.begin, "on_train_batch_end": failure.end}
        try:
            training(device=device, seed=number, callbacks=callbacks, is_stock=True, **arguments)
        except (RuntimeError, torch.cuda.OutOfMemoryError):
            if not failure.mode.injected:
                raise
            found["runs_that_ended"] += 1
        failure.leave()
        found["injected"] += len(failure.mode.injected)
        found["runs"] += 1
        found["images_wanted"] += failure.wanted
        found["images_trained"] += failure.trained
        print(f"stock: {found['runs_that_ended']} of {found['runs']} runs ended", flush=True)
    not_trained = found["images_wanted"] - found["images_trained"]
    return {**found, "runs_that_ended": found["runs_that_ended"], "images_not_trained": not_trained}


class _OneFailure:
    """Callbacks of a training that let one allocation of its second epoch fail."""

    def __init__(self, device: str, chance: random.Random) -> None:
        from benchmarks.common.allocations import FailingAllocations

        self.mode = FailingAllocations(device, like_cuda=True)
        self.wanted = self.trained = 0
        self._chance, self._allocations, self._is_entered = chance, 0, False

    def begin(self, trainer: Any) -> None:
        """Count the allocations of the first step, and let one fail in the steps after it."""
        self.wanted = trainer.epochs * len(trainer.train_loader.dataset)
        if trainer.epoch == 1 and not self.mode.injected:
            self.mode.reset({self._chance.randrange(self._allocations)} if self._allocations else ())
            self.mode.__enter__()
            self._is_entered = True

    def end(self, trainer: Any) -> None:
        """Count the images of a step that has ended."""
        self.trained += trainer.batch_size
        self._allocations = self._allocations or self.mode.count
        self.leave()

    def leave(self) -> None:
        """Let no allocation fail from now on."""
        if self._is_entered:
            self.mode.__exit__(None, None, None)
        self._is_entered = False


def failures(
    device: str, seconds: float, wanted: int, stock_runs: int, processes: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the content of the part, more of it each time.

    Args:
        device: `cpu` or `cuda`.
        seconds: Time that the part may take.
        wanted: Failures to inject.
        stock_runs: Trainings of stock.
        processes: Processes at the same time.
        seed: Seed of the first draws.
    """
    end, found = time.monotonic() + seconds, dict[str, Any]()
    settings: dict[str, Any] = {**TINY, "data": drawn(120 if device == "cpu" else 320), "epochs": 4, "device": device}
    model, same = "tiniest", settings["model"]
    if device == "cuda":
        model, same = "yolov12n.yaml", "yolo12n.yaml"
        settings |= {"model": model, "imgsz": 320, "batch": 16, "nbs": 16, "bn_group": 4}
    call = partial(shared_out, processes=processes, seed=seed, variables={"OMP_NUM_THREADS": "1"})
    arguments = {**settings, "model": same, "epochs": 2}
    found["stock"] = call("endurance_failures:stock", part="runs", amount=stock_runs, stock=True, **arguments)
    yield found
    half, left = -(-wanted // 2), end - time.monotonic()
    found["exact"] = call(
        "endurance_failures:exact", part="failures", amount=half, seconds=0.5 * left, device=device, model=model
    )
    yield found
    rest, left = wanted - found["exact"]["injected"], end - time.monotonic()
    found["trainings"] = call("endurance_failures:trainings", part="failures", amount=rest, seconds=left, **settings)
    yield {**found, "injected": sum(found[name]["injected"] for name in ("exact", "trainings"))}
