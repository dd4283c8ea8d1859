"""`trainer.model` is the user's own model: what a script sees of it and does with it is the same as on stock."""

import json
from pathlib import Path

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import SETTINGS

from yolov12 import demo

UNSPLIT = {"bn_group": 8, "micro_batch": 8}

_LOOK = """
import copy, io, json, pickle, sys
import torch
from ultralytics import YOLO

out = open(sys.argv[3], "w")
def say(*words):
    print(*words, file=out, flush=True)

def show(event, trainer):
    model, file = trainer.model, io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for kind, found in {
        "itself": model,
        "deepcopy": copy.deepcopy(model),
        "saved": torch.load(file, weights_only=False),
        "pickled": pickle.loads(pickle.dumps(model)),
    }.items():
        same = all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values()))
        modules = dict(found.named_modules())
        say(event, kind, type(found), same, type(getattr(found, "criterion", None)))
        say(next(iter(found.named_parameters()))[0], list(found.state_dict()), sorted(vars(found)))
        say(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()))
        say([name for name, module in modules.items() if "forward" in vars(module)])

yolo = YOLO(sys.argv[1])
for event in sys.argv[4:]:
    yolo.add_callback(event, lambda trainer, event=event: show(event, trainer))
yolo.train(**json.loads(sys.argv[2]))
"""
EVENTS = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
          "on_train_epoch_end", "on_fit_epoch_end", "on_model_save", "on_train_end")  # fmt: skip


def test_a_script_prints_the_same_of_the_model(trainings, run_python, small_model, tmp_path):
    data = demo.ensure(trainings.TINY["data"], Path(SETTINGS["datasets_dir"]))
    printed = []
    for patched, more in (("0", {}), ("1", trainings.SPLIT)):
        arguments = {**trainings.TINY, "epochs": 1, "data": str(data), "project": str(tmp_path), "name": patched}
        arguments = {key: value for key, value in arguments.items() if key != "recipe"} | more
        file = tmp_path / f"seen{patched}"
        done = run_python(
            "-c", _LOOK, small_model, json.dumps(arguments), str(file), *EVENTS, YOLOV12_AUTOPATCH=patched
        )
        assert done.returncode == 0, done.stderr
        printed.append(file.read_text().splitlines())
    assert printed[1] == printed[0]
    assert {line.split()[0] for line in printed[0] if line.startswith("on_")} == {*EVENTS}
    assert not (tmp_path / "0" / "memory.csv").exists()
    assert "2 2 2 2" in (tmp_path / "1" / "memory.csv").read_text()


class Sam(DetectionTrainer):
    """Takes the gradient where the loss is highest nearby (Foret et al., 2020, https://arxiv.org/abs/2010.01412)."""

    kept = None

    def optimizer_step(self):
        moved = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.stack([parameter.grad.norm() for parameter in moved]).norm()
        moves = [0.05 * parameter.grad / norm for parameter in moved]
        with torch.no_grad():
            torch._foreach_add_(moved, moves)
        self.optimizer.zero_grad()
        loss, _ = self.model(self.kept)
        loss.sum().backward()
        with torch.no_grad():
            torch._foreach_sub_(moved, moves)
        super().optimizer_step()


class SamThatPreprocesses(Sam):
    """Keeps the batch that its own method returns."""

    def preprocess_batch(self, batch):
        self.kept = super().preprocess_batch(batch)
        return self.kept


def keep_batches(trainer):
    """Callback of `on_train_start`."""
    stock = trainer.preprocess_batch

    def preprocess(batch):
        trainer.kept = stock(batch)
        return trainer.kept

    trainer.preprocess_batch = preprocess


@pytest.mark.parametrize(
    ("trainer", "callbacks"), [(SamThatPreprocesses, []), (Sam, [("on_train_start", keep_batches)])]
)
def test_a_second_forward_in_the_loop_gives_stocks_gradient(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, trainer, callbacks
):
    stock, ours = (
        trainings.train(tmp_path, small_model, **settings, epochs=1, trainer=trainer, callbacks=callbacks)
        for settings in ({"mas": False}, UNSPLIT)
    )
    assert_same_weights(ours, stock)
    assert ours.micro_batches() == [[8]] * trainings.BATCHES
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])


def test_a_second_forward_of_a_batch_that_was_split_is_of_the_whole_batch(trainings, small_model, tmp_path):
    run = trainings.train(
        tmp_path, small_model, **trainings.SPLIT, epochs=1, trainer=Sam, callbacks=[("on_train_start", keep_batches)]
    )
    assert [images for images, *_ in run.seen] == [2, 2, 2, 2, 8] * trainings.BATCHES


def ordinary_batch(images=4):
    """A batch as `preprocess_batch` returns it."""
    draw = torch.Generator().manual_seed(0)
    boxes = torch.rand(2 * images, 4, generator=draw) * 0.2 + 0.3
    return {
        "img": torch.rand(images, 3, 64, 64, generator=draw),
        "batch_idx": torch.arange(images).repeat_interleave(2).float(),
        "cls": torch.arange(2 * images).view(-1, 1) % 10 * 1.0,
        "bboxes": boxes,
    }


def _probe(batch):
    """Loss of the training mode without gradients, and in evaluation mode, and gradients."""

    def probe(trainer):
        model = trainer.model
        with torch.no_grad():
            found = [model(batch(trainer))[0].tolist()]
        loss, items = model(batch(trainer))
        assert loss.grad_fn is not None
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss.sum(), wanted)
        return [*found, loss.tolist(), {name: float(item) for name, item in items.items()},
                [float(gradient.double().square().sum()) for gradient in gradients]]  # fmt: skip

    return probe


def _loaders_batch(trainer):
    """The same images as the loader collates them, through the trainer's own preprocessing."""
    batch = ordinary_batch()
    return trainer.preprocess_batch({**batch, "img": (batch["img"] * 255).to(torch.uint8)})


@pytest.mark.parametrize(
    "probe",
    [_probe(lambda trainer: ordinary_batch()), _probe(_loaders_batch)],
    ids=["ordinary", "preprocessed"],
)
def test_calls_with_a_batch_of_the_users_own_give_stocks_numbers(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, probe
):
    events = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
              "on_train_epoch_end", "on_fit_epoch_end")  # fmt: skip
    found = {}

    def train(settings):
        seen = found.setdefault(str(settings), [])
        callbacks = [(event, lambda trainer: seen.append(probe(trainer))) for event in events]
        return trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=callbacks)

    stock, ours, split = train({"mas": False}), train(UNSPLIT), train(trainings.SPLIT)
    assert_same_weights(ours, stock)
    in_stock, in_ours, in_split = found.values()
    assert in_ours == in_stock
    assert in_split[0] == in_stock[0]
    assert len(in_split) == 2 + 2 * trainings.BATCHES + 3
    assert split.micro_batches() == [[2] * 4] * trainings.BATCHES


def test_a_probe_of_the_loops_batch_gives_stocks_loss(trainings, small_model, tmp_path, assert_same_weights):
    found = {}

    def train(settings):
        losses = found.setdefault(str(settings), [])

        def probe(trainer):
            with torch.no_grad():
                losses.append(trainer.model(trainer.kept)[0].tolist())

        callbacks = [("on_train_start", keep_batches), ("on_train_batch_end", probe)]
        return trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=callbacks)

    stock, ours = train({"mas": False}), train(UNSPLIT)
    assert_same_weights(ours, stock)
    in_stock, in_ours = found.values()
    assert in_ours == in_stock
    assert len({str(loss) for loss in in_stock}) == trainings.BATCHES


def test_hooks_of_the_model_see_ordinary_batches_and_change_the_loss(
    trainings, small_model, tmp_path, stock_run, assert_same_weights
):
    found = {}

    def train(settings):
        seen = found.setdefault(str(settings), [])

        def before(model, inputs):
            seen.append((type(inputs[0]), list(inputs[0]), inputs[0]["img"].dtype, float(inputs[0]["img"].max())))

        def after(model, inputs, output):
            return output[0] * 2, output[1]

        def register(trainer):
            trainer.model.register_forward_pre_hook(before)
            trainer.model.register_forward_hook(after)

        return trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=[("on_train_start", register)])

    stock, ours, _ = train({"mas": False}), train(UNSPLIT), train(trainings.SPLIT)
    assert_same_weights(ours, stock)
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])
    in_stock, in_ours, in_split = found.values()
    assert in_ours == in_stock
    assert len(in_split) == 4 * len(in_stock) == 4 * trainings.BATCHES
    assert {kind for kind, *_ in in_split} == {dict}
    assert {str(keys) for _, keys, *_ in in_split} == {str(keys) for _, keys, *_ in in_stock}
    assert max(highest for *_, highest in in_split) == max(highest for *_, highest in in_stock) <= 1.0
