"""Code of the user's own sees whole batches, as on stock, and what it does with them is trained on exactly."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.loss import v8DetectionLoss

from yolov12.errors import ConfigError
from yolov12.training.adapter.batch_values import Belongs, Values

UNSPLIT = {"bn_group": 16, "micro_batch": 16}
IN_GROUPS = {"bn_group": 2, "micro_batch": 16}


def _crowd(batch):
    """One image gets 200 boxes, another one in each batch, and one loses all of its boxes."""
    image = int(batch["im_file"][0].split("/")[-1].split(".")[0][-1]) % 8
    draw = torch.Generator().manual_seed(image)
    kept = batch["batch_idx"] != (image + 1) % 8
    more = {
        "batch_idx": torch.full((200,), float(image)),
        "cls": torch.randint(0, 10, (200, 1), generator=draw).float(),
        "bboxes": torch.rand(200, 4, generator=draw) * 0.2 + torch.tensor([0.3, 0.3, 0.05, 0.05]),
    }
    objects = {key: torch.cat((batch[key][kept], value)) for key, value in more.items()}
    order = objects["batch_idx"].argsort(stable=True)
    return {**batch, **{key: value[order] for key, value in objects.items()}}


def _twice(batch):
    """Every image is there twice, the second time mirrored; values that no loss reads are left as they are."""
    boxes = batch["bboxes"] * torch.tensor([-1.0, 1.0, 1.0, 1.0]) + torch.tensor([1.0, 0.0, 0.0, 0.0])
    return {
        **batch,
        "img": torch.cat((batch["img"], batch["img"].flip(3))),
        "batch_idx": torch.cat((batch["batch_idx"], batch["batch_idx"] + len(batch["img"]))),
        "cls": batch["cls"].repeat(2, 1),
        "bboxes": torch.cat((batch["bboxes"], boxes)),
    }


def _fewer(batch):
    """The last three images are left out, and their objects."""
    kept = batch["batch_idx"] < 5
    objects = {key: batch[key][kept] for key in ("batch_idx", "cls", "bboxes")}
    return {key: objects.get(key, value[:5]) for key, value in batch.items()}


def _mix(batch):
    """Images are mixed with others of the batch, and made brighter, all of it at random."""
    images = batch["img"]
    partners = images[torch.randperm(len(images))]
    factor = 0.9 + 0.1 * torch.tensor(np.random.rand(len(images)), dtype=torch.float32)  # noqa: NPY002
    return {**batch, "img": images.lerp(partners, random.random() * 0.2) * factor.view(-1, 1, 1, 1)}


def trainer_with(change):
    """A trainer whose `preprocess_batch` changes what stock's returns, counts its calls and keeps its result."""

    class Own(DetectionTrainer):
        def preprocess_batch(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            self.kept = change(super().preprocess_batch(batch))
            return self.kept

    return Own


def states(found):
    """Callback that notes the state of all random generators, and what the trainer has kept."""

    def note(trainer):
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
        found.append(
            (random.getstate(), numpy, torch.get_rng_state().tolist(), trainer.calls, len(trainer.kept["img"]))
        )

    return "on_train_batch_end", note


@pytest.mark.parametrize(
    ("change", "more"),
    [(_crowd, {}), (_twice, {}), (_fewer, {}), (_mix, {"multi_scale": 0.5, "imgsz": 96})],
    ids=["crowd", "twice", "fewer", "mix and scale"],
)
def test_a_preprocess_batch_of_the_users_own_trains_as_on_stock(
    trainings, small_model, tmp_path, assert_same_weights, change, more
):
    """It is called once for each batch, with the same random numbers, and no warm-up shows; split or not."""
    found = {}

    def train(settings):
        seen = found.setdefault(str(settings), [])
        return trainings.train(
            tmp_path,
            small_model,
            **settings,
            **more,
            epochs=1,
            val=False,
            trainer=trainer_with(change),
            callbacks=[states(seen)],
        )

    stock, ours, groups, split = (train(settings) for settings in ({"mas": False}, {}, IN_GROUPS, trainings.SPLIT))
    in_stock, *others = found.values()
    assert others == [in_stock] * 3
    assert [calls for *_, calls, _ in in_stock] == [1, 2, 3, 4]
    assert_same_weights(ours, stock, rounded=change is _crowd)
    images = in_stock[0][-1]
    assert ours.trainer.args.bn_group == 32  # as a warm-up has found out
    assert ours.micro_batches() == [[images]] * trainings.BATCHES
    assert split.micro_batches()[0] == [2] * (images // 2 - images % 2) + [3] * (images % 2)
    assert groups.micro_batches()[0] == [images]
    torch.testing.assert_close(split.after, groups.after, rtol=1e-3, atol=1e-5)


SIZES = []  # of every batch that the loss was called with, by the model or its copies


class CountingLoss(v8DetectionLoss):
    """Counts its calls."""

    def loss(self, preds, batch):
        SIZES.append(len(batch["img"]))
        return super().loss(preds, batch)


def test_a_loss_of_the_users_own_is_called_as_on_stock(trainings, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")

    def put(trainer):
        trainer.model.criterion = CountingLoss(trainer.model)

    found = []
    for settings in ({"mas": False}, {}, trainings.SPLIT):
        SIZES.clear()
        trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=[("on_pretrain_routine_end", put)])
        found.append(tuple(SIZES))
    assert found == [found[0]] * 3
    assert found[0][: trainings.BATCHES] == (8,) * trainings.BATCHES


class Counting(nn.SiLU):
    """Layer of the user's own that keeps what it saw, in every way."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes = 0, []
        self.register_buffer("images", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.sizes.append(len(x))
            self.images = self.images + len(x)
            self.latest = float(x.detach().sum())
            assert random.random() + np.random.rand() + float(torch.rand(())) > 0  # noqa: NPY002
        return super().forward(x)


def test_a_layer_of_the_users_own_sees_no_warm_up(trainings, small_model, tmp_path, monkeypatch, assert_same_weights):
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")

    def put(trainer):
        trainer.model.model[1].act = Counting()
        trainer.model.seen = []
        trainer.model.model[0].register_forward_hook(lambda *_: trainer.model.seen.append(trainer.model.training))

    stock, ours = (
        trainings.train(
            tmp_path, small_model, **settings, epochs=1, val=False, callbacks=[("on_pretrain_routine_end", put)]
        )
        for settings in ({"mas": False}, {})
    )
    assert "BatchNorm sees" in ours.log
    one, other = (run.trainer.model.model[1].act for run in (ours, stock))
    assert (one.calls, one.sizes, one.latest, int(one.images)) == (4, [8] * 4, other.latest, 32)
    assert ours.trainer.model.seen == stock.trainer.model.seen == [True] * trainings.BATCHES
    assert_same_weights(ours, stock)
    assert ours.draws == stock.draws


def test_a_whole_batch_that_does_not_fit_is_preprocessed_in_parts(trainings, small_model, tmp_path):
    sizes = []

    def change(batch):
        sizes.append(len(batch["img"]))
        if len(batch["img"]) > 2:
            random.random()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return batch

    run = trainings.train(tmp_path, small_model, **trainings.SPLIT, epochs=1, val=False, trainer=trainer_with(change))
    stock = trainings.train(tmp_path, small_model, **trainings.SPLIT, epochs=1, val=False)
    assert sizes == [8, 2, 2, 2, 2] * trainings.BATCHES
    assert run.log.count("memory: preprocess_batch is called with parts of a batch, as it does not fit as a whole") == 1
    assert run.draws == stock.draws
    assert all(torch.equal(value, stock.after[name]) for name, value in run.after.items())

    def change_more(batch):
        return _twice(change(batch))

    trainings.train(
        tmp_path, small_model, **trainings.SPLIT, epochs=1, trainer=trainer_with(change_more), raises=ConfigError
    )


def collating(values):
    """A trainer whose collate functions add these values: key → function of the batch."""

    class Own(DetectionTrainer):
        def build_dataset(self, img_path, mode="train", batch=None):
            dataset = super().build_dataset(img_path, mode, batch)
            stock = dataset.collate_fn

            def collate(samples):
                found = stock(samples)
                return {**found, **{key: value(found) for key, value in values.items()}}

            dataset.collate_fn = collate
            return dataset

    return Own


KEYS = {
    "number": lambda batch: 3.0,
    "none": lambda batch: None,
    "word": lambda batch: "eightlet",
    "scalar": lambda batch: torch.tensor(5),
    "dict": lambda batch: {"tensor": torch.ones(8), "nested": [torch.zeros(2)]},
    "array": lambda batch: batch["img"].float().mean((1, 2, 3)).numpy(),
    "lists": lambda batch: [[float(each.max())] for each in batch["img"].float()],
    "tensors": lambda batch: [each[:1] for each in batch["img"]],
    "areas": lambda batch: batch["bboxes"][:, 2:].prod(1),
    "classes": lambda batch: batch["cls"][:, 0].numpy(),
    "names": lambda batch: [str(int(each)) for each in batch["cls"]],
}


def test_keys_of_a_collate_function_are_told_apart_by_what_they_are(
    trainings, small_model, tmp_path, assert_same_weights
):
    found = {}

    def train(settings):
        seen = found.setdefault(str(settings), [])

        def register(trainer):
            trainer.model.register_forward_pre_hook(lambda model, inputs: seen.append(dict(inputs[0])))

        return trainings.train(
            tmp_path,
            small_model,
            **settings,
            epochs=1,
            trainer=collating(KEYS),
            callbacks=[("on_train_start", register)],
        )

    stock, ours, _ = train({"mas": False}), train(UNSPLIT), train(trainings.SPLIT)
    in_stock, in_ours, in_split = found.values()
    assert_same_weights(ours, stock)
    assert ours.stock_results()[0] == pytest.approx(stock.stock_results()[0], abs=2e-5)  # rounded to five places
    for one, other in zip(in_ours, in_stock, strict=True):
        assert list(one) == list(other)
        assert {key: repr(value) for key, value in one.items()} == {key: repr(value) for key, value in other.items()}
    assert [len(part["img"]) for part in in_split] == [2] * 4 * trainings.BATCHES
    for part in in_split:
        part["img"] = part["img"] * 255
        for key in ("array", "lists", "tensors", "areas", "classes", "names"):
            wanted = KEYS[key](part)
            assert type(part[key]) is type(wanted)
            assert len(part[key]) == len(wanted)
            for mine, value in zip(part[key], wanted, strict=True):
                assert np.allclose(mine, value, rtol=1e-5) if key != "names" else mine == value
        assert (part["number"], part["none"], part["word"], int(part["scalar"])) == (3.0, None, "eightlet", 5)
        assert torch.equal(part["dict"]["tensor"], torch.ones(8))


@pytest.mark.parametrize("value", [[1, 2, 3], torch.zeros(3, 2), np.zeros(5)], ids=["list", "tensor", "array"])
def test_a_value_that_cannot_be_split_up_is_an_error_only_where_it_has_to_be(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, value
):
    trainer = collating({"strange": lambda batch: value})
    updates = []
    callbacks = [("on_train_batch_end", updates.append)]
    with pytest.raises(ConfigError, match=rf"'strange' \({len(value)} entries\).*a smaller batch or mas=False"):
        trainings.train(tmp_path, small_model, **trainings.SPLIT, epochs=1, trainer=trainer, callbacks=callbacks)
    assert not updates
    ours = trainings.train(tmp_path, small_model, **UNSPLIT, epochs=1, val=False, trainer=trainer)
    assert_same_weights(ours, stock_run)


def test_as_many_objects_as_images_are_told_apart_by_other_batches():
    def batch(image_of, **values):
        objects = {"batch_idx": torch.tensor(image_of), "cls": torch.zeros(len(image_of), 1)}
        return {"img": torch.zeros(3, 3, 4, 4), **objects, **values}

    values, three = Values(["cls"]), [1, 2, 3]
    found = [values.of(batch([0, 0, 2], a=three, b=three)), values.of(batch([0, 1, 2], a=three, b=three))]
    found.append(values.of(batch([0, 0, 0, 1], a=three, b=[*three, 4], c=[1])))
    found += [values.of(batch([0, 0, 2], a=three, b=three, c=three)), values.of(batch([2, 2], a=[1, 2], b=three))]
    assert [[each[key] for key in ("a", "b")] for each in found] == [
        [Belongs.UNKNOWN] * 2, [Belongs.IMAGES] * 2, *[[Belongs.IMAGES, Belongs.OBJECTS]] * 2, [Belongs.UNKNOWN] * 2
    ]  # fmt: skip
    assert [each["c"] for each in found[2:4]] == [Belongs.UNKNOWN] * 2
    assert all((each["img"], each["cls"]) == (Belongs.IMAGES, Belongs.OBJECTS) for each in found)


def _unordered(batch):
    """Objects of a batch in another order."""
    return {key: batch[key].flip(0) for key in ("batch_idx", "cls", "bboxes")}


class Unordered(DetectionTrainer):
    """Its loader gives objects in another order than images."""

    def build_dataset(self, img_path, mode="train", batch=None):
        dataset = super().build_dataset(img_path, mode, batch)
        if mode == "train":
            stock = dataset.collate_fn
            dataset.collate_fn = lambda samples: (lambda found: {**found, **_unordered(found)})(stock(samples))
        return dataset


def test_objects_need_not_be_in_the_order_of_their_images(trainings, small_model, tmp_path):
    """Ultralytics' own loss needs an order; hooks before it may make it."""

    def register(trainer):
        def sort(model, inputs):
            batch = inputs[0]
            order = batch["batch_idx"].argsort(stable=True)
            batch.update({key: batch[key][order] for key in ("batch_idx", "cls", "bboxes")})

        trainer.model.register_forward_pre_hook(sort)

    runs = [
        trainings.train(
            tmp_path,
            small_model,
            **settings,
            epochs=1,
            val=False,
            trainer=Unordered,
            callbacks=[("on_train_start", register)],
        )
        for settings in (IN_GROUPS, trainings.SPLIT)
    ]
    assert [run.micro_batches()[0] for run in runs] == [[8], [2] * 4]
    torch.testing.assert_close(runs[1].after, runs[0].after, rtol=1e-3, atol=1e-5)
