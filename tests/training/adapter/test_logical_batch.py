"""Whoever looks into a batch of a training sees what stock shows, and what is written on it is trained on."""

import copy
import gc
import io
import pickle
import random
import weakref

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer

from yolov12.training.adapter.deferred_tensor import TensorFacts
from yolov12.training.adapter.logical_batch import SAME, UNKNOWN, LogicalBatch
from yolov12.training.data.resolution import ResolutionControl

UNSPLIT = {"bn_group": 8, "micro_batch": 8}
SPLIT = {"bn_group": 2, "micro_batch": 2}
SCALED = {"multi_scale": 0.5, "imgsz": 96}


def facts(value):
    """Everything that tells two values apart."""
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), value.dtype, value.device, value.requires_grad, value.tolist()
    return type(value), value


def contents(batch):
    """Return key and facts of every value of a batch, in order."""
    return [(key, facts(value)) for key, value in batch.items()]


class Host:
    """A loader's batch of two images with three objects, and stock's preprocessing, counted."""

    def __init__(self):
        self.calls = 0
        self.host = {
            "img": torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8),
            "im_file": ("a.jpg", "b.jpg"),
            "cls": torch.tensor([[1.0], [2.0], [3.0]]),
            "batch_idx": torch.tensor([0.0, 1.0, 1.0]),
        }

    def preprocess(self, batch):
        self.calls += 1
        batch["img"] = batch["img"].float() / 255
        batch["seed"] = 7
        return batch

    def expected(self):
        """What stock shows."""
        return {**self.host, "img": self.host["img"].float() / 255, "seed": 7}

    def batch(self, *, ran):
        """Before the model had it, or after."""
        batch = LogicalBatch.of(self.host, None, torch.nn.Identity(), self.preprocess, lambda batch: None)
        if ran:
            tensors = {
                key: TensorFacts(value.shape, value.dtype, value.device)
                for key, value in self.expected().items()
                if isinstance(value, torch.Tensor)
            }
            batch.describe({key: tensors.get(key, SAME) for key in self.host} | {"seed": UNKNOWN}, self.preprocess)
        return batch


LOOKS = {
    "items": lambda batch: dict(batch.items()),
    "values": lambda batch: dict(zip(batch.keys(), batch.values(), strict=True)),
    "dict()": dict,
    "**": lambda batch: {**batch},
    "call": lambda batch: (lambda **given: given)(**batch),
    "copy": lambda batch: batch.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "torch.save": lambda batch: _saved(batch),
    "type": lambda batch: type(batch)(batch),
    "iteration": lambda batch: {key: batch[key] for key in batch},
    "get": lambda batch: {key: batch.get(key) for key in reversed(list(reversed(batch)))},
    "|": lambda batch: batch | {},
    "| reflected": lambda batch: {} | batch,
    "update": lambda batch: _updated(batch),
    "popitem": lambda batch: dict(reversed([batch.popitem() for _ in range(len(batch))])),
    "pop": lambda batch: {key: batch.pop(key) for key in list(batch)},
    "setdefault": lambda batch: {key: batch.setdefault(key, None) for key in list(batch)},
    "match": lambda batch: _matched(batch),
}


def _saved(batch):
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    found = torch.load(file)
    assert isinstance(found, dict)
    return dict(found)  # OrderedDict is the only kind beside plain dictionaries that PyTorch 2.6 loads by default


def _updated(batch):
    found = {}
    found.update(batch)
    return found


def _matched(batch):
    match batch:
        case {"img": images, **others}:
            return {"img": images, **others}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("look", LOOKS)
def test_every_way_to_look_shows_what_stock_shows(look, ran):
    host = Host()
    found = LOOKS[look](host.batch(ran=ran))
    assert type(found) is dict
    assert contents(found) == contents(host.expected())
    assert host.calls == 1


@pytest.mark.parametrize("ran", [False, True])
def test_single_questions_are_answered_as_of_a_dictionary(ran):
    expected, host = Host().expected(), Host()
    assert len(host.batch(ran=ran)) == len(expected)
    assert "seed" in host.batch(ran=ran)
    assert "ids" not in host.batch(ran=ran)
    assert host.batch(ran=ran)["seed"] == 7
    assert host.batch(ran=ran).get("ids", 3) == 3
    assert bool(host.batch(ran=ran))
    assert isinstance(host.batch(ran=ran), dict)
    assert repr(host.batch(ran=ran)) == repr(expected)
    assert host.batch(ran=ran).keys() == expected.keys()
    batch = host.batch(ran=ran)
    assert batch == batch.copy()
    assert not (batch != batch.copy())  # noqa: SIM202 - both operators
    assert batch != {}
    with pytest.raises(KeyError, match="ids"):
        host.batch(ran=ran)["ids"]
    with pytest.raises(TypeError, match="unhashable"):
        hash(batch)


@pytest.mark.parametrize("ran", [False, True])
def test_what_is_written_is_there(ran):
    host = Host()
    batch, expected = host.batch(ran=ran), host.expected()
    for each in (batch, expected):
        each["img"] *= 2
        each["new"] = 5
        each |= {"newer": 6}
        each.update(seed=8)
        del each["im_file"]
        each["cls"][0] = 9
    assert contents(batch) == contents(expected)
    assert contents(batch.shown()) == contents(expected)


def test_after_the_model_had_it_nothing_is_made_for_a_shape():
    host = Host()
    batch = host.batch(ran=True)
    images = batch["img"]
    assert (images.shape, images.size(), images.size(0), images.size(-1)) == ((2, 3, 4, 4), (2, 3, 4, 4), 2, 4)
    assert (len(images), images.ndim, images.dim(), images.numel()) == (2, 4, 4, 96)
    assert (images.dtype, images.device.type) == (torch.float32, "cpu")
    assert batch.get("cls", images).shape[0] == 3
    assert batch["im_file"] == ("a.jpg", "b.jpg")
    assert list(batch) == list(host.expected())
    assert torch.is_tensor(images)
    assert isinstance(images, torch.Tensor)
    assert host.calls == 0
    assert images.max() > 0
    assert images.min() == 0
    assert batch["seed"] == 7
    assert host.calls == 1


class Seeding(DetectionTrainer):
    """Adds a key."""

    def preprocess_batch(self, batch):
        return {**super().preprocess_batch(batch), "seed": self.args.seed}


def look_at_shapes(trainer):
    """Look at shapes, as the loop does."""
    kept = trainer.kept
    assert kept["img"].shape[-1] == 64
    assert kept["img"].dtype == torch.float32
    assert kept.get("cls", kept["img"]).shape[0] == len(kept["bboxes"])
    assert ("seed" in kept) is isinstance(trainer, Seeding)
    assert len(kept["im_file"]) == 8


def look_at_pixels(trainer):
    """Look at pixels and at a value of the batch as a whole."""
    assert 0.1 < float(trainer.kept["img"].max()) <= 1
    assert trainer.kept.get("seed", trainer.args.seed) == trainer.args.seed


def keep(trainer, change=lambda batch: None):
    """Callback of `on_train_start`: batches are kept, and changed before the model has them."""
    stock = trainer.preprocess_batch

    def preprocess(batch):
        trainer.kept = stock(batch)
        return change(trainer.kept) or trainer.kept

    trainer.preprocess_batch = preprocess


@pytest.mark.parametrize(
    ("trainer", "settings", "look", "calls"),
    [
        (DetectionTrainer, UNSPLIT, look_at_shapes, 1),
        (DetectionTrainer, UNSPLIT, look_at_pixels, 2),
        (DetectionTrainer, SPLIT, look_at_shapes, 4),
        (DetectionTrainer, SPLIT, look_at_pixels, 5),
        (Seeding, UNSPLIT, look_at_pixels, 1),
        (Seeding, SPLIT, look_at_pixels, 1),
    ],
)
def test_nothing_is_preprocessed_without_need(
    trainings, small_model, tmp_path, monkeypatch, trainer, settings, look, calls
):
    """Stock's code is called for each part, and again for who looks; a user's own once, with the whole batch."""
    counted, wrap = [], ResolutionControl.preprocess

    def counting(control, stock, arguments):
        run = wrap(control, stock, arguments)
        return lambda batch: counted.append(len(batch["img"])) or run(batch)

    monkeypatch.setattr(ResolutionControl, "preprocess", counting)
    callbacks = [("on_train_start", keep), ("on_train_batch_end", look)]
    trainings.train(tmp_path, small_model, **settings, epochs=1, trainer=trainer, callbacks=callbacks)
    assert len(counted) == calls * trainings.BATCHES
    assert sum(counted) == trainings.IMAGES * (1 + (trainer is DetectionTrainer and look is look_at_pixels))


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.deep), SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("early", [False, True], ids=["after the model", "before it"])
def test_a_batch_of_a_training_shows_what_stock_shows(
    trainings, small_model, tmp_path, assert_same_weights, more, early
):
    """Images of a batch that is split are in another order."""
    found = {}

    def train(settings):
        seen = found.setdefault(str(settings), [])

        def look(batch):
            state = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
            seen.append(contents(batch))
            again = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
            assert early or again == state

        callbacks = [("on_train_start", lambda trainer: keep(trainer, look if early else lambda batch: None))]
        if not early:
            callbacks.append(("on_train_batch_end", lambda trainer: look(trainer.kept)))
        return trainings.train(tmp_path, small_model, **settings, **more, epochs=1, callbacks=callbacks)

    stock, ours, split = train({"mas": False}), train(UNSPLIT), train({"bn_group": 2, "micro_batch": 2})
    in_stock, in_ours, in_split = found.values()
    assert in_ours == in_stock
    assert ours.draws == stock.draws == split.draws
    assert_same_weights(ours, stock)
    assert split.batches(8) == stock.batches(8)
    assert split.micro_batches() == [[2] * 4] * trainings.BATCHES
    for one, other in zip(in_split, in_stock, strict=True):
        assert [(key, value[:5] if value[0] == "tensor" else value[0]) for key, value in one] == [
            (key, value[:5] if value[0] == "tensor" else value[0]) for key, value in other
        ]
        assert sorted(dict(one)["img"][-1]) == sorted(dict(other)["img"][-1])
    sizes = {dict(batch)["img"][1] for batch in in_stock}
    assert (len(sizes) > 1) is bool(more)


def _darker(batch):
    batch["img"] *= 0.5


def _darker_unnoticed(batch):
    """The version of the tensor stays what it was."""
    batch["img"].numpy()[:] *= 0.7
    batch["img"].data.mul_(0.7)


def _darker_copy(batch):
    return {**batch, "img": batch["img"] * 0.5}


def _fewer_objects(batch):
    keep = batch["cls"][:, 0] > 2
    batch.update({key: batch[key][keep] for key in ("cls", "bboxes", "batch_idx")})


def _a_note(batch):
    batch["note"] = 3.0
    batch["img"] *= 0.5


@pytest.mark.parametrize("write", [_darker, _darker_unnoticed, _darker_copy, _fewer_objects, _a_note])
def test_what_is_written_before_the_model_is_trained_on(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, write
):
    begin = ("on_train_start", lambda trainer: keep(trainer, write))
    stock, ours, split = (
        trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=[begin])
        for settings in ({"mas": False}, UNSPLIT, trainings.SPLIT)
    )
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])
    assert_same_weights(ours, stock)
    assert split.batches(8) == stock.batches(8)
    by_stock = write is _darker_copy
    assert [images for images, *_ in split.seen] == ([8] if by_stock else [2] * 4) * trainings.BATCHES
    told = "memory: the model was not given what preprocess_batch returned: batches run as Ultralytics runs them"
    assert split.log.count(told) == by_stock


class Inverting(DetectionTrainer):
    """Inverts images, and leaves plotting to Ultralytics."""

    def preprocess_batch(self, batch):
        batch["img"].bitwise_not_()
        return super().preprocess_batch(batch)


class Plotting(Inverting):
    """Looks at what it is to plot."""

    def plot_training_samples(self, batch, ni):
        self.plotted = [*getattr(self, "plotted", []), (ni, type(batch), contents(batch))]
        super().plot_training_samples(batch, ni)


def plot_batches(trainer):
    """Callback: only batches are plotted."""
    trainer.args.plots = not trainer.args.plots


@pytest.mark.parametrize(("trainer", "more"), [(None, SCALED), (Inverting, {}), (Plotting, {}), (Plotting, SCALED)])
def test_what_is_trained_on_is_plotted(trainings, small_model, tmp_path, trainer, more):
    """A plot of the user's own is given what stock gives."""
    stock, ours = (
        trainings.train(
            tmp_path,
            small_model,
            **settings,
            **more,
            epochs=1,
            trainer=trainer,
            callbacks=[("on_train_start", plot_batches), ("on_train_epoch_end", plot_batches)],
        )
        for settings in ({"mas": False}, UNSPLIT)
    )
    for number in range(3):
        one, other = (cv2.imread(str(run.folder / f"train_batch{number}.jpg")) for run in (ours, stock))
        assert np.array_equal(one, other)
    if trainer is Plotting:
        assert ours.trainer.plotted == [(ni, dict, shown) for ni, _, shown in stock.trainer.plotted]
        assert [ni for ni, *_ in ours.trainer.plotted] == [0, 1, 2]


def test_a_batch_is_freed_as_soon_as_nobody_uses_it():
    """Without the garbage collector: a loader's batches lie in pinned or in shared memory."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    alive = weakref.ref(images)
    batch = LogicalBatch.of({"img": images}, None, nn.Identity(), lambda host: host, lambda batch: None)
    del images
    batch.describe(
        {"img": TensorFacts(torch.Size((2, 3, 8, 8)), torch.float32, torch.device("cpu"))}, lambda host: host
    )
    gc.disable()
    try:
        assert batch["img"].shape[0] == 2
        assert float(batch["img"].sum()) == 0
        del batch
        assert alive() is None
    finally:
        gc.enable()
