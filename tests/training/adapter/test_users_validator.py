"""A validator's own code sees what Ultralytics shows it, whatever runs in slices, and its numbers count."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.models.yolo.obb import OBBValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator

from yolov12.errors import DoesNotFitError

STOCK, SLICED = {"mas": False}, {"micro_batch": 3}
VALIDATORS = {
    "detect": DetectionValidator,
    "segment": SegmentationValidator,
    "pose": PoseValidator,
    "obb": OBBValidator,
}


@pytest.fixture(autouse=True)
def same_arithmetic():
    """Use PyTorch's own convolutions; in oneDNN and NNPACK, rounding depends on the number of images."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def data(trainings, tmp_path_factory):
    """Data set of a task."""
    files = {}

    def get(task):
        if task not in files:
            folder = tmp_path_factory.mktemp(task) / "data"
            files[task] = trainings.draw_data(folder, task, [(64, 64), (64, 96)])
        return files[task]

    return get


@pytest.fixture(scope="module")
def weights(task_models, tmp_path_factory):
    """Weights of an untrained model of a task, which finds many objects."""
    files = {}

    def get(task):
        if task not in files:
            torch.manual_seed(0)
            model = YOLO(task_models[task])
            for branch in model.model.model[-1].cv3:
                branch[-1].bias.data += 4
            files[task] = tmp_path_factory.mktemp(task) / "model.pt"
            model.save(files[task])
        return files[task]

    return get


def shown(value):
    """Copy a value, as it is now."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [shown(each) for each in value] if isinstance(value, (list, tuple)) else value


def kinds(value):
    """Describe predictions but for their numbers: of an untrained model, roundings choose among them."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, dict):
        return {key: kinds(each) for key, each in value.items()}
    return [kinds(each) for each in value]


def assert_same(found, wanted, at=()):
    """Check values for equal kinds, and equal numbers but for rounding."""
    assert type(found) is type(wanted), at
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3, msg=lambda text: f"{at}: {text}")
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted), at
        for key, value in wanted.items():
            assert_same(found[key], value, (*at, key))
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), at
        for index, value in enumerate(wanted):
            assert_same(found[index], value, (*at, index))
    else:
        assert found == wanted or found != found, at


class Looks:
    """Looks at everything that it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.looked = []

    def init_metrics(self, model):
        self.looked.append(("init_metrics", type(model)))
        super().init_metrics(model)

    def update_metrics(self, preds, batch):
        image = batch["img"][0]  # before anything else makes the images
        self.looked.append(("update_metrics", shown(image), shown(batch["img"][2:4]), kinds(preds), shown(batch)))
        assert float(batch["img"].max()) <= 1
        super().update_metrics(preds, batch)

    def plot_val_samples(self, batch, ni):
        self.looked.append(("plot_val_samples", shown(batch), ni))

    def plot_predictions(self, batch, preds, ni):
        self.looked.append(("plot_predictions", shown(batch), kinds(preds), ni))

    def gather_stats(self):
        self.args.plots = False  # curves and matrices take long
        super().gather_stats()


class Preprocesses(Looks):
    """Normalises images, in a method of its own."""

    def preprocess(self, batch):
        self.looked.append(("preprocess", shown(batch)))
        batch = super().preprocess(batch)
        batch["img"] = (batch["img"] - 0.4) / 0.2
        batch["mean"] = batch["img"].mean()
        return batch

    def update_metrics(self, preds, batch):
        self.looked.append(("update_metrics", kinds(preds), shown(batch)))
        super(Looks, self).update_metrics(preds, batch)


class Postprocesses(Looks):
    """Looks at the outputs of the model, and keeps the best boxes only."""

    def postprocess(self, preds):
        self.looked.append(("postprocess", shown(preds)))
        found = super().postprocess(preds)
        return [{key: value[:2] for key, value in each.items()} for each in found]


class Reshapes(Preprocesses):
    """Enlarges images, and hands on predictions in a form of its own."""

    def preprocess(self, batch):
        batch = DetectionValidator.preprocess(self, batch)
        batch["img"] = F.interpolate(batch["img"], scale_factor=2)
        return batch

    def postprocess(self, preds):
        return {"images": super().postprocess(preds)}

    def update_metrics(self, preds, batch):
        super().update_metrics(preds["images"], batch)

    def plot_predictions(self, batch, preds, ni):
        super().plot_predictions(batch, preds["images"], ni)


def from_a_callback(validator):
    """Callback of `on_val_start`: normalises images."""
    stock = validator.preprocess

    def preprocess(batch):
        validator.looked.append(("preprocess", shown(batch)))
        return {**(found := stock(batch)), "img": found["img"] - 0.5}

    validator.preprocess = preprocess


def wrap_in_each_batch(validator):
    """Callback of `on_val_batch_start`: wraps the method that is there."""
    stock = validator.preprocess
    validator.preprocess = lambda batch: {**(found := stock(batch)), "img": found["img"] * 0.5}


def preprocess_other_images(validator):
    """Callback of `on_val_batch_end`: uses the method and the postprocessing for images of its own."""
    batch = next(iter(validator.dataloader))
    validator.looked.append(("other", shown(validator.preprocess(batch)["img"])))


def validate(kind, task, weights, data, folder, callbacks=(), **settings):
    """Validate a model with a validator of the user's own; return names of its metrics, and what it saw."""
    validators = []

    class Own(kind, VALIDATORS[task]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            validators.append(self)

    model = YOLO(weights(task))
    for event, callback in callbacks:
        model.add_callback(event, callback)
    options = {"imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "channels_last": False, "max_det": 20}
    found = model.val(validator=Own, data=data(task), project=folder, plots=True, **options, **settings)
    (validator,) = validators
    return list(found.results_dict), validator.looked


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        (Looks, ("detect", "segment", "pose", "obb")),
        (Preprocesses, ("detect", "segment", "pose")),
        (Postprocesses, ("detect", "obb")),
        (Reshapes, ("detect",)),
    ],
)
def test_methods_see_what_stock_shows_them(data, weights, tmp_path, kind, tasks):
    for task in tasks:
        stock, ours = (validate(kind, task, weights, data, tmp_path, **settings) for settings in (STOCK, SLICED))
        counts = Counter(event for event, *_ in stock[1])
        assert counts["init_metrics"] == 1
        assert counts["update_metrics"] == 2
        assert [event for event, *_ in ours[1]] == [event for event, *_ in stock[1]]
        assert_same(ours, stock, (task,))


@pytest.mark.parametrize(
    ("event", "callback"),
    [
        ("on_val_start", from_a_callback),
        ("on_val_batch_start", wrap_in_each_batch),
        ("on_val_batch_end", preprocess_other_images),
    ],
)
def test_callbacks_change_what_they_change_on_stock(data, weights, tmp_path, event, callback):
    stock, ours = (
        validate(Looks, "detect", weights, data, tmp_path, [(event, callback)], **settings)
        for settings in (STOCK, SLICED)
    )
    assert_same(ours, stock)


def test_other_inferences_of_a_callback_are_the_models_own(data, weights, tmp_path):
    """A callback runs the model of a validation on images of its own, between two batches."""

    class Runs(Looks):
        def init_metrics(self, model):
            self.model = model
            super().init_metrics(model)

        def update_metrics(self, preds, batch):
            super().update_metrics(preds, batch)
            outputs = self.model(torch.full((2, 3, 64, 64), 0.3))
            self.looked.append(("outputs", shown(outputs), kinds(self.postprocess(outputs))))

    stock, ours = (validate(Runs, "detect", weights, data, tmp_path, **settings) for settings in (STOCK, SLICED))
    assert_same(ours, stock)


@pytest.mark.parametrize("method", ["preprocess", "postprocess"])
def test_a_whole_batch_that_does_not_fit_is_one_clear_error(data, weights, tmp_path, method):
    """Code of the user's own sees whole batches, so it is for the user to make them smaller."""

    def fail(validator, value):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    kind = type("Large", (Looks,), {method: fail})
    with pytest.raises(DoesNotFitError, match=rf"{method} of Own.*Tried to allocate.*a smaller batch; or") as raised:
        validate(kind, "detect", weights, data, tmp_path, **SLICED)
    assert isinstance(raised.value.__cause__, torch.cuda.OutOfMemoryError)


class Normalising(DetectionTrainer):
    """Normalises images in training and validation."""

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        batch["img"] = (batch["img"] - 0.4) / 0.2
        return batch

    def get_validator(self):
        stock = super().get_validator()
        return type("Own", (Preprocesses, DetectionValidator), {})(
            self.test_loader, save_dir=self.save_dir, args=stock.args, _callbacks=self.callbacks
        )


def test_a_trainer_and_validator_that_normalise_give_stocks_results(trainings, task_models, data, tmp_path):
    stock, ours = (
        trainings.train(tmp_path, task_models["detect"], data=data("detect"), trainer=Normalising, **settings)
        for settings in (STOCK, {"bn_group": 8, "micro_batch": 8})
    )
    assert ours.stock_results() == stock.stock_results()
    assert ours.stock_results()[-1]["val/box_loss"] > 0
    assert_same(ours.trainer.validator.looked, stock.trainer.validator.looked)
    assert not {"preprocess", "postprocess", "init_metrics", "finalize_metrics"} & vars(ours.trainer.validator).keys()


class ByColumn(DetectionValidator):
    """Knows batches whose `batch_idx` is a column, which nothing else knows."""

    def _prepare_batch(self, si, batch):
        return super()._prepare_batch(si, {**batch, "batch_idx": batch["batch_idx"].view(-1)})


class OfColumns(DetectionTrainer):
    """Validates on such batches."""

    def get_validator(self):
        stock, collate = super().get_validator(), self.test_loader.collate_fn

        def in_columns(samples):
            batch = collate(samples)
            return {**batch, "batch_idx": batch["batch_idx"].view(-1, 1)}

        self.test_loader.collate_fn = in_columns
        return ByColumn(self.test_loader, save_dir=self.save_dir, args=stock.args, _callbacks=self.callbacks)


def test_batches_of_validation_that_cannot_be_split_run_whole(trainings, task_models, data, tmp_path):
    stock, ours = (
        trainings.train(tmp_path, task_models["detect"], data=data("detect"), trainer=OfColumns, epochs=1, **settings)
        for settings in (STOCK, {"bn_group": 8, "micro_batch": 8})
    )
    assert ours.stock_results() == stock.stock_results()
    assert ours.log.count("validation runs as Ultralytics runs it") == 1
