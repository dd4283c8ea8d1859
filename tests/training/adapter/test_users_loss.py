"""A loss of the user's own is the one that trains, whenever and wherever on the model it was set."""

import functools
from types import MethodType

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils.loss import v8DetectionLoss

UNSPLIT = {"bn_group": 8, "micro_batch": 8}
OWN_LOSS = "memory: the loss is not one of Ultralytics' own: batches run as Ultralytics runs them"


class OwnLoss(v8DetectionLoss):
    """Cares more about classes."""

    def loss(self, preds, batch):
        loss, items = super().loss(preds, batch)
        return loss * torch.tensor([1.0, 3.0, 1.0]), items


class OwnSum(torch.nn.BCEWithLogitsLoss):
    """Focuses on what is difficult."""

    def forward(self, scores, targets):
        return super().forward(scores, targets) * (scores.detach().sigmoid() - targets).abs()


def _criterion(model):
    model.criterion = OwnLoss(model)


def _criterion_function(model):
    stock = v8DetectionLoss(model)
    model.criterion = lambda preds, batch: (stock(preds, batch)[0] * 0.5, stock(preds, batch)[1])


def _part_of_criterion(model):
    model.criterion = v8DetectionLoss(model)
    model.criterion.bce = OwnSum(reduction="none")


def _method_of_criterion(model):
    model.criterion = v8DetectionLoss(model)
    stock = model.criterion.loss
    model.criterion.loss = lambda preds, batch: (stock(preds, batch)[0] * 0.5, stock(preds, batch)[1])


def _loss(model):
    def loss(self, batch, preds=None):
        loss, items = type(self).loss(self, batch, preds)
        return loss + 0.1 * next(self.parameters()).square().sum(), items

    model.loss = MethodType(loss, model)


def _init_criterion(model):
    model.criterion, model.init_criterion = None, lambda: OwnLoss(model)


def _forward(model):
    stock = model.forward

    def forward(x, *args, **kwargs):
        found = stock(x, *args, **kwargs)
        return (found[0] * 0.5, found[1]) if isinstance(x, dict) else found

    model.forward = forward


ASSIGNED = [_criterion, _criterion_function, _part_of_criterion, _method_of_criterion, _loss, _init_criterion, _forward]


def at_batch(number, do):
    """Callback that does something with the model before a batch; the first is at hand when the training starts."""
    count = []

    def callback(trainer):
        count.append(trainer)
        if len(count) == max(number, 1):
            do(trainer.model)

    return "on_train_batch_start" if number else "on_train_start", callback


@pytest.mark.parametrize(
    ("assign", "batch"),
    [*((assign, 0) for assign in ASSIGNED), (_criterion, 3), (_init_criterion, 3)],
)
def test_a_loss_of_the_users_own_trains(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, assign, batch
):
    """Split or not, it runs as stock runs it."""

    def train(**settings):
        return trainings.train(tmp_path, small_model, **settings, epochs=1, callbacks=[at_batch(batch, assign)])

    stock, ours, split = train(mas=False), train(**UNSPLIT), train(**trainings.SPLIT)
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])
    assert_same_weights(ours, stock)
    assert (stock.log.count(OWN_LOSS), ours.log.count(OWN_LOSS), split.log.count(OWN_LOSS)) == (0, 1, 1)
    before = max(batch - 1, 0)
    assert [images for images, *_ in split.seen] == [2] * 4 * before + [8] * (trainings.BATCHES - before)
    assert (f"{before} of {before} updates" if before else "no step was complete") in split.log
    if not batch:  # only the order of images in a batch is another
        torch.testing.assert_close(split.after, stock.after, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "signed"),
    [(BaseModel, "forward", False), (BaseModel, "forward", True), (v8DetectionLoss, "loss", True)],
)
def test_a_method_that_replaces_that_of_ultralytics_class_is_the_users_own(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, monkeypatch, kind, name, signed
):
    """It may compute anything, whatever name and module it bears."""
    stock_method = getattr(kind, name)

    def method(self, x, *args, **kwargs):
        found = stock_method(self, x, *args, **kwargs)
        return (found[0].sqrt(), found[1]) if isinstance(x, dict) else found

    monkeypatch.setattr(kind, name, functools.wraps(stock_method)(method) if signed else method)
    stock, split = (
        trainings.train(tmp_path, small_model, **settings, epochs=1)
        for settings in ({"mas": False}, {**trainings.SPLIT, "bn_group": 0})
    )
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])
    assert_same_weights(split, stock)
    assert split.log.count(OWN_LOSS) == 1


class OwnModel(DetectionModel):
    """Its loss is halved."""

    def forward(self, x, *args, **kwargs):
        found = super().forward(x, *args, **kwargs)
        return (found[0] * 0.5, found[1]) if isinstance(x, dict) else found


class OwnTrainer(DetectionTrainer):
    """Trains it."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        return self.set_model_names_for_load(OwnModel(cfg, nc=self.data["nc"], verbose=False))


def test_a_class_of_the_users_own_is_trained_as_stock_trains_it(
    trainings, small_model, tmp_path, stock_run, assert_same_weights, monkeypatch
):
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")  # the checkpoints hold the class
    stock, ours, split = (
        trainings.train(tmp_path, small_model, **settings, epochs=1, trainer=OwnTrainer)
        for settings in ({"mas": False, "draws_by_place": False}, UNSPLIT, trainings.SPLIT)
    )
    assert type(ours.trainer.model) is OwnModel
    assert_same_weights(ours, stock)
    assert_same_weights(split, stock)
    assert not torch.equal(stock.after["model.0.conv.weight"], stock_run.after["model.0.conv.weight"])
    assert split.log.count("memory: OwnModel is not split up: batches run as Ultralytics runs them") == 1
    assert ours.stock_results() == stock.stock_results()


class RootLoss(v8DetectionLoss):
    """Square root of the usual one: parts of a batch cannot be put together."""

    def loss(self, preds, batch):
        loss, items = super().loss(preds, batch)
        return loss.sqrt(), {name: item.sqrt() for name, item in items.items()}


class RootTrainer(DetectionTrainer):
    """Trains Ultralytics' model with it."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)
        model.init_criterion = RootOf(model)
        return model


class RootOf:
    """Makes the loss; a copy of a model has its own."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        return RootLoss(self.model)


def test_a_loss_of_the_users_own_is_validated_as_stock_validates_it(trainings, small_model, tmp_path, monkeypatch):
    """In batches of 16 images, not in slices."""
    monkeypatch.setenv("YOLOV12_TRUST_WEIGHTS", "1")
    stock, ours = (
        trainings.train(tmp_path, small_model, **settings, epochs=1, data="demo:images=40,val=0.5", trainer=RootTrainer)
        for settings in ({"mas": False}, UNSPLIT)
    )
    assert ours.stock_results() == stock.stock_results()
