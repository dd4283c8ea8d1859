"""Puts the memory-aware engine into an Ultralytics trainer that has just been set up.

Nothing of Ultralytics is replaced: its loop calls `trainer.model`, `preprocess_batch`, `optimizer_step` and a few
others, and on this one trainer they are now ours, and call its own.
"""

from __future__ import annotations

import copy
import math
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas import Config, Engine, Journal, Result
from yolov12.mas.config import DEFAULTS, GROUPS
from yolov12.mas.distributed.ranks import ALONE, Ranks
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS
from yolov12.mas.step.first_update import Undo, copy_on_host
from yolov12.models.activations import activations
from yolov12.models.layer_names import layer_names
from yolov12.models.optimizer_state import OPTIMIZERS, optimizer_state
from yolov12.training.adapter.detection import DetectionTask
from yolov12.training.data.loader import SKIPPED, ResumableLoader, resumable
from yolov12.training.data.resolution import DataLayer, rungs
from yolov12.training.data.sharing import SHARE, Share, Sharing, augment_by_place
from yolov12.training.run import team
from yolov12.training.run.options import Interval
from yolov12.training.run.run_state import FILE, Keeper, find

__all__ = ["STATE", "attach", "do_train", "resume", "why_not"]

STATE = "mas_state"
"""Of the trainer and of a checkpoint's `optimizer`: what the engine had learned when it was saved."""

_FOUND, _KEEPER = "yolov12_state", "yolov12_keeper"  # of a trainer

_MODELS = ("DetectionModel", "OBBModel", "SegmentationModel", "PoseModel")
_WIDTH = 22  # of the progress bar's column
_COLUMN = "memory/peak_MiB"


def attach(trainer: Any) -> None:
    """Let the engine run this trainer's batches, unless `mas=False` or the training is of a kind it does not know."""
    from ultralytics.utils import LOGGER, USER_CONFIG_DIR

    model = _unwrapped(trainer)
    if not trainer.resume:
        Path(trainer.wdir, FILE).unlink(missing_ok=True)  # of another run that was in this folder
    if (reason := why_not(trainer, model)) is not None:
        if trainer.args.mas:
            LOGGER.info(f"memory: {reason}: batches run as Ultralytics runs them")
        if ignored := _ignored(trainer.args):
            LOGGER.warning(f"memory: {reason}, so there is no use for {', '.join(ignored)}")
        return
    data_layer = _data_layer(trainer)
    task = DetectionTask(
        model,
        data_layer.preprocess(trainer.preprocess_batch, trainer.args),
        multi_scale=trainer.args.multi_scale > 0,
        overlapping_masks=trainer.args.overlap_mask,
    )
    others = team.found()
    ranks = others.ranks if others is not None else ALONE
    if not task.exact:
        LOGGER.info("memory: parts of a batch are weighted by images, as this loss is not divided by one sum")
    state = getattr(trainer, _FOUND, None)
    Path(trainer.save_dir).mkdir(parents=True, exist_ok=True)  # on another machine than rank 0 there may be none
    engine = Engine(
        model,
        task,
        Config.parse(vars(trainer.args)),
        journal=Journal(
            trainer.save_dir,
            resume=bool(trainer.resume),
            steps=state and state["rows"],
            rank=ranks.rank,
            ranks=ranks.size,
        ),
        backward=lambda loss: trainer.scaler.scale(loss).backward(),
        layers=layer_names(model),
        activations=activations(model),
        cache=USER_CONFIG_DIR / "yolov12-plans",
        ways_out=lambda share: _ways_out(trainer, share),
        optimizer_bytes=lambda: _optimizer_bytes(trainer, model),
        smaller=data_layer.smaller if trainer.args.mas_data != "off" else None,
        ranks=ranks,
        log=LOGGER.info,
    )
    _keep_what_is_learned(trainer, engine)
    data_layer.serve(engine)
    joint = _Joint(trainer, model, task, engine, data_layer, ranks)
    if state is not None and joint.keeper is not None:
        joint.keeper.restore(state)
        delattr(trainer, _FOUND)


def resume(stock_resume: Callable[..., None], trainer: Any, checkpoint: Any) -> None:
    """Run Ultralytics' `resume_training`, or find what is newer than the checkpoint, for `attach` to resume from."""
    if not (checkpoint and trainer.resume):
        stock_resume(trainer, checkpoint)
        return
    setattr(trainer, STATE, (checkpoint.get("optimizer") or {}).get(STATE))
    exact = why_not(trainer, _unwrapped(trainer)) is None and resumable(trainer.train_loader)
    state = find(trainer, checkpoint) if exact else None
    if (others := team.found()) is not None and not _same_on_all(others.ranks, state):
        state = None
    if state is None and checkpoint["epoch"] == -1 and checkpoint.get("optimizer") is not None:
        from ultralytics.utils import LOGGER

        LOGGER.warning("resume: no epoch was complete: it begins anew, from the weights there are")
        trainer._load_checkpoint_state(checkpoint)
    elif state is None:
        stock_resume(trainer, checkpoint)
    else:
        setattr(trainer, STATE, state["optimizer"].get(STATE))
        setattr(trainer, _FOUND, state)


def _same_on_all(ranks: Ranks, state: dict[str, Any] | None) -> bool:
    """Whether all ranks have found the same state; where they share no folder, they may not."""
    step = -1 if state is None else state["epoch"] * 2**32 + state["loader"]["position"]
    return ranks.least(step) == -ranks.least(-step)


def do_train(stock_train: Callable[..., Any], trainer: Any) -> Any:
    """Run Ultralytics' `_do_train`; whatever ends it, nothing is lost that was done."""
    others = team.found()
    try:
        done = stock_train(trainer)
        if others is not None:
            if (keeper := getattr(trainer, _KEEPER, None)) is not None:
                keeper.flush()
            others.ranks.all(True)  # journals of all are complete
        return done
    except BaseException as error:
        if (keeper := getattr(trainer, _KEEPER, None)) is not None:
            keeper.save_at_last()
        blamed = others.ranks.blame(error) if others is not None and _of_a_collective(error) else None
        team.disband(blamed or error)
        if blamed is not None:
            raise blamed from error
        raise
    finally:
        if (keeper := getattr(trainer, _KEEPER, None)) is not None:
            keeper.end()
        team.disband()


def _of_a_collective(error: BaseException) -> TypeGuard[RuntimeError]:
    """Of Ultralytics' own, as in validation: they fail when another process is gone."""
    words = "gloo", "NCCL", "Connection closed", "Connection reset"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _keep_what_is_learned(trainer: Any, engine: Engine) -> None:
    """In every checkpoint, with the optimizer's state, which plain Ultralytics reads around and drops at the end."""
    learned = getattr(trainer, STATE, None)
    if learned:
        engine.load_state_dict(learned)
    trainer.optimizer.register_state_dict_post_hook(lambda _, state: {**state, STATE: engine.state_dict()})


class _Joint:
    """Stands between one trainer and its engine."""

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        task: DetectionTask,
        engine: Engine,
        data_layer: DataLayer,
        ranks: Ranks,
    ) -> None:
        self._trainer, self._task, self._engine, self._data_layer = trainer, task, engine, data_layer
        self._ranks = ranks
        self._of_epoch: dict[str, float] = {}
        self.keeper: Keeper | None = None  # of a loader of the user's own, nothing is known
        self._sharing: Sharing | None = None
        if resumable(trainer.train_loader):
            if ranks.size > 1:
                self._sharing = _share(trainer, ranks, engine, data_layer)
            arrange = engine.config.bn_group != 0 and trainer.batch_size > (engine.config.bn_group or GROUPS[0])
            loader = ResumableLoader(
                trainer.train_loader,
                trainer.args.imgsz,
                arrange=arrange and self._sharing is None,  # of a share, no rank knows the whole
                sharing=self._sharing,
            )
            trainer.train_loader = loader
            every = Interval.parse(trainer.args.save_every)
            self.keeper = Keeper(
                trainer, model, engine, loader, every, data_layer, self._of_epoch, saves=ranks.rank == 0
            )
            setattr(trainer, _KEEPER, self.keeper)
            engine.stopping = lambda: self.keeper is not None and self.keeper.interruption.due
        elif ranks.size > 1:
            raise ConfigError("a loader of your own cannot be shared among processes: train in one, or with mas=False")
        if ranks.size > 1 and trainer.args.time:
            self._stock_warmup, trainer._get_warmup_iterations = trainer._get_warmup_iterations, self._warmup
        self._updates_asked = 0
        # A run that began without the engine goes on with the columns it has.
        self._logs = not trainer.csv.exists() or _COLUMN in trainer.csv.read_text().partition("\n")[0]
        self._stock_update, self._stock_validate = trainer.optimizer_step, trainer.validate
        self._stock_memory, self._stock_header = trainer._get_memory, trainer.progress_string
        trainer.model = _Wrapper(model, self._run)
        trainer.preprocess_batch = lambda batch: batch  # it stays on the host until its part is due
        trainer.optimizer_step = self._update
        trainer.validate = self._validate
        trainer._get_memory = self._memory
        trainer.progress_string = self._header
        self._stock_plot = trainer.plot_training_samples
        trainer.plot_training_samples = self._plot
        trainer.add_callback("on_train_epoch_start", self._epoch_starts)
        trainer.add_callback("on_train_epoch_end", self._epoch_ends)
        trainer.add_callback("teardown", self._finish)

    def _run(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.keeper is not None:
            if SKIPPED in batch:
                return self.keeper.skip()
            if self._sharing is None:
                self.keeper.interruption.check()
        result = self._step_of_all(batch) if self._sharing else self._engine.step(self._data_layer.before(batch))
        self._data_layer.after()
        self._keep_group()
        latest, of_epoch = self._engine.latest, self._of_epoch
        assert latest is not None
        of_epoch[_COLUMN] = max(of_epoch.get(_COLUMN, 0.0), round(latest.peak_bytes / 2**20, 1))
        of_epoch["memory/budget_MiB"] = round(latest.budget_bytes / 2**20, 1)
        of_epoch["memory/micro_batch"] = max(of_epoch.get("memory/micro_batch", 0), *self._engine.micro_batches)
        # A leaf: Ultralytics' own backward has nothing left to do.
        return result.loss.requires_grad_(), dict(result.items)

    def _step_of_all(self, batch: dict[str, Any]) -> Result:
        """All ranks do the same, and a signal that one has got ends all of them after the same step."""
        assert self._sharing is not None
        assert self.keeper is not None
        share: Share = batch.pop(SHARE)
        self._task.of_all = share.of_all
        if self._trainer.args.multi_scale > 0:
            random.seed(share.seed)  # the size that is drawn is that of the whole batch
        self._ranks.say.stop = self.keeper.interruption.due
        result = self._engine.step(self._data_layer.before(batch), share.of_all, counts=share.counts)
        if any(said.stop for said in self._ranks.said):
            self.keeper.interruption.check()
            raise SystemExit(128 + signal.SIGTERM)
        self._sharing.observe(self._ranks.said)
        return result

    def _warmup(self, batches: int) -> int:
        """Ultralytics has just reckoned from its clock how many epochs there will be; others' clocks say otherwise."""
        trainer = self._trainer
        trainer.epochs = trainer.args.epochs = self._ranks.least(trainer.epochs)
        return int(self._stock_warmup(batches))

    def _keep_group(self) -> None:
        """The group is fixed for the run, and for those that resume or repeat it."""
        from ultralytics.utils import YAML

        args, group = self._trainer.args, self._engine.bn_group
        if args.bn_group != group:
            args.bn_group = group
            if self._ranks.rank:
                return
            file = self._trainer.save_dir / "args.yaml"
            YAML.save(file, {**YAML.load(file), "bn_group": group})

    def _update(self) -> None:
        if self.keeper is not None and self.keeper.skipping:
            return
        self._updates_asked += 1
        with self.keeper.step() if self.keeper is not None else nullcontext():
            self._engine.update(self._trainer.optimizer, self._stock_update, lambda: _remember(self._trainer))

    def _validate(self) -> Any:
        size, self._trainer.world_size = self._trainer.world_size, 1  # its statistics are put together in validation.py
        try:
            metrics, fitness = self._stock_validate()
        finally:
            self._trainer.world_size = size
        return (metrics if metrics is None else {**metrics, **self._metrics()}), fitness

    def _metrics(self) -> dict[str, float]:
        """Of this epoch, for results.csv and every logger."""
        return dict(self._of_epoch) if self._logs else {}

    def _epoch_starts(self, trainer: Any) -> None:
        self._engine.epoch = trainer.epoch + 1
        self._of_epoch.clear()
        self._heed_signals(at_once=self._sharing is None)

    def _epoch_ends(self, trainer: Any) -> None:
        if trainer.metrics is not None:  # only of one of several ranks
            trainer.metrics = {**trainer.metrics, **self._metrics()}
        self._heed_signals(at_once=True)

    def _heed_signals(self, *, at_once: bool) -> None:
        if self.keeper is not None:
            self.keeper.interruption.at_once = at_once
            if at_once:
                self.keeper.interruption.check()

    def _memory(self, fraction: bool = False) -> float:
        return float(self._stock_memory(fraction)) if fraction else _Column(self._engine)

    def _header(self) -> str:
        return str(self._stock_header().replace(f"{'GPU_mem':>11}", f"{'GPU_mem':>{_WIDTH}}", 1))

    def _plot(self, batch: Any, ni: int) -> None:
        if SKIPPED not in batch:
            self._stock_plot(batch, ni)

    def _finish(self, trainer: Any) -> None:
        from ultralytics.utils import LOGGER

        summary = self._engine.close(updates_expected=self._updates_asked)
        if summary is not None and not self._ranks.rank:
            LOGGER.info(summary.as_text())


class _Wrapper(nn.Module):
    """Stands where DistributedDataParallel would: `unwrap_model` sees through it, checkpoints never hold it."""

    def __init__(self, module: nn.Module, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self._run = module, run

    def forward(self, batch: Any) -> Any:
        return self._run(batch) if self.training and isinstance(batch, dict) else self.module(batch)

    def __getattr__(self, name: str) -> Any:  # for callbacks that look into the model
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _Column(float):
    """Peak/budget in GiB and micro-batch × count, where the progress bar formats a number before a `G`."""

    _engine: Engine

    def __new__(cls, engine: Engine) -> _Column:
        column = super().__new__(cls, engine.latest.peak_bytes / 2**30 if engine.latest else 0.0)
        column._engine = engine
        return column

    def __format__(self, spec: str) -> str:
        if self._engine.latest is None:
            return super().__format__(spec)
        sizes, budget = self._engine.micro_batches, self._engine.latest.budget_bytes / 2**30
        return f"{max(sizes)}x{len(sizes)}  {float(self):.3g}/{budget:.3g}".rjust(_WIDTH - 1)


def _share(trainer: Any, ranks: Ranks, engine: Engine, data_layer: DataLayer) -> Sharing:
    """Let all ranks draw the batches that one process would draw."""
    loader = trainer.train_loader
    loader.sampler.set_epoch = lambda epoch: None  # for the loop: the order is the generator's
    augment_by_place(loader.dataset)
    group = engine.config.bn_group
    batch = min(trainer.batch_size, len(loader.dataset))
    if group is None:  # larger than it may come out, all of which divide it
        group = next(group for group in GROUPS if group * ranks.size <= batch)
    ahead = loader.num_workers * (loader.prefetch_factor or 0) + 1
    boxes = None
    if group and batch > group and hasattr(loader.dataset, "labels"):
        boxes = [len(label["cls"]) for label in loader.dataset.labels]
    move_ms = 0.0 if engine.meter.kind == "host" else NEW_SIZE_MS  # the same on all ranks
    return Sharing(ranks, batch, group or 1, ahead, move_ms, boxes, lambda: data_layer.rung)


def _unwrapped(trainer: Any) -> nn.Module:
    from ultralytics.utils.torch_utils import unwrap_model

    model: nn.Module = unwrap_model(trainer.model)
    return model


def _data_layer(trainer: Any) -> DataLayer:
    args = trainer.args
    smallest = args.mas_min_imgsz or args.imgsz // 2
    layer = DataLayer(args.mas_data, rungs(args.imgsz, smallest, trainer.stride), trainer.stride)
    layer.join(trainer.train_loader.dataset, args)
    return layer


def _ignored(args: Any) -> list[str]:
    """Arguments of the engine that the user has set."""
    given = {key: getattr(args, key, default) for key, default in DEFAULTS.items() if key != "mas"}
    return [f"{key}={value}" for key, value in given.items() if value != DEFAULTS[key]]


def why_not(trainer: Any, model: nn.Module) -> str | None:
    """Say why batches run as Ultralytics runs them; None where the engine runs them."""
    if not trainer.args.mas:
        return "mas=False"
    if trainer.device.type not in ("cuda", "cpu"):
        return f"{trainer.device.type} devices do not tell their memory"
    for name in ("compile", "distill_model", "quantize"):
        if getattr(trainer.args, name, None):
            return f"{name} is set"
    if type(model).__name__ not in _MODELS:
        return f"{type(model).__name__} is not split up"
    return None


def _remember(trainer: Any) -> Undo:
    """What an optimizer step changes besides parameters and optimizer."""
    scaler = copy.deepcopy(trainer.scaler)
    ema = trainer.ema
    updates = ema.updates if ema else 0
    values = copy_on_host(list(ema.ema.state_dict().values()) if ema else [])

    def undo() -> None:
        trainer.scaler = scaler
        if ema:
            ema.updates = updates
        values()

    return undo


def _optimizer_bytes(trainer: Any, model: nn.Module) -> int:
    """That the first update will add."""
    name = type(trainer.optimizer).__name__
    if trainer.optimizer.state or name not in OPTIMIZERS:
        return 0
    return optimizer_state(model, name)[1]


def _ways_out(trainer: Any, share: float) -> Sequence[str]:
    size = int(trainer.args.imgsz * math.sqrt(share)) // trainer.stride * trainer.stride
    smaller = [f"imgsz={size}"] if trainer.stride <= size < trainer.args.imgsz else []
    amp = [] if trainer.amp or trainer.device.type == "cpu" else ["amp=True"]
    return [*amp, *smaller]
