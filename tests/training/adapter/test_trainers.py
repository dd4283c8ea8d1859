"""Trainings with callbacks, the user's own trainers, early stopping and recovery from NaN, and their weights."""

import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.torch_utils import unwrap_model


def test_a_model_behind_the_wrapper_is_reached_by_callbacks(trainings, tmp_path):
    found = []

    def look(trainer):
        found.append((trainer.model.names, type(trainer.model.model[-1]).__name__, trainer.model.stride.tolist()))
        assert not hasattr(trainer.model, "no_such_thing")
        assert unwrap_model(trainer.model).training == trainer.model.training

    trainings.train(
        tmp_path, **trainings.SPLIT, epochs=1, callbacks=[("on_train_start", look), ("on_train_batch_end", look)]
    )
    assert len(found) == 1 + trainings.BATCHES
    assert all(len(names) == 10 and head == "Detect" and stride == [8, 16, 32] for names, head, stride in found)


class WorseAndWorse(DetectionTrainer):
    """Trainer whose fitness falls from epoch to epoch."""

    def validate(self):
        metrics, _ = super().validate()
        return metrics, 1.0 - self.epoch


def test_early_stopping(trainings, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, epochs=9, patience=1, trainer=WorseAndWorse)
    assert len(run.results) == 2
    assert "Training stopped early" in run.log
    assert len(run.memory) == 2 * trainings.BATCHES


@pytest.mark.parametrize(("nbs", "images"), [(8, [8] * 12), (24, [24, 24, 8, 24])])
def test_a_loss_that_is_not_a_number_is_recovered_from(trainings, tmp_path, nbs, images):
    """The loss is NaN once, at the end of the second epoch. With nbs=24, Ultralytics then drops two waiting batches."""
    left = []
    for settings in ({"mas": False}, trainings.SPLIT):
        done = []

        def break_weights(trainer, done=done):
            done.append(trainer.epoch)
            if len(done) == 8:
                with torch.no_grad():
                    next(iter(trainer.model.parameters())).fill_(float("nan"))

        run = trainings.train(tmp_path, **settings, nbs=nbs, callbacks=[("on_train_batch_start", break_weights)])
        assert "recovering from last.pt" in run.log
        assert len(run.results) == 2
        assert all(torch.isfinite(value).all() for value in run.after.values())
        left.append((run.steps, run.trainer.ema.updates, done))
    assert left[0] == left[1]
    assert [int(row["images"]) for row in run.memory] == images
    assert run.summary["updates"] == run.steps == len(images)


_LOAD = """
import sys, torch
from ultralytics import YOLO
try:
    YOLO("yolo12n.yaml").train(resume=sys.argv[1])
except SyntaxError as error:
    assert "mem_safety_ratio" in str(error)
    print("it does not resume")
for file in sys.argv[1:]:
    model = YOLO(file)
    assert "yolov12.seams" not in sys.modules
    print(sorted({type(m).__module__.partition(".")[0] for m in model.model.modules()}))
    print(float(model.model.eval()(torch.ones(1, 3, 64, 64))[0].double().sum()))
"""


def test_weights_load_in_plain_ultralytics_and_runs_do_not_resume_there(trainings, v1_run, run_python):
    files = [v1_run.folder / "weights" / name for name in ("best.pt", "last.pt")]
    done = run_python("-c", _LOAD, *map(str, files), YOLOV12_AUTOPATCH="0")
    assert done.returncode == 0, done.stderr
    assert "it does not resume" in done.stdout
    lines = done.stdout.splitlines()[-4:]
    for file, modules, total in zip(files, lines[::2], lines[1::2], strict=True):
        assert modules == "['torch', 'ultralytics']"
        ours = YOLO(file).model.eval()(torch.ones(1, 3, 64, 64))[0]
        assert float(total) == pytest.approx(float(ours.double().sum()), rel=1e-4)


@pytest.fixture(scope="module")
def v1_run(trainings, tmp_path_factory):
    return trainings.train(tmp_path_factory.mktemp("v1"), "yolo12n.yaml", **trainings.SPLIT, epochs=1)


class OwnTrainer(DetectionTrainer):
    """Trainer as users write them: it reads labels and changes a tensor in place."""

    updated = 0

    def preprocess_batch(self, batch):
        assert len(batch["cls"]) == len(batch["bboxes"])
        batch["img"].bitwise_not_()
        return super().preprocess_batch(batch)

    def optimizer_step(self):
        OwnTrainer.updated += 1
        super().optimizer_step()


def test_a_column_of_memory_of_the_users_own_is_shown(trainings, tmp_path):
    class Counting(DetectionTrainer):
        def _get_memory(self, fraction=False):
            return super()._get_memory(fraction) if fraction else 4.25

    run = trainings.train(tmp_path, epochs=1, trainer=Counting)
    assert "4.25G" in run.bar


@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.deep), {"multi_scale": 0.5}], ids=["plain", "scaled"]
)
def test_a_trainer_of_the_users_own_is_called(trainings, tmp_path, more):
    sums = []
    for settings in ({"mas": False}, trainings.SPLIT, {"micro_batch": 2}):
        OwnTrainer.updated = 0
        run = trainings.train(tmp_path, **settings, **more, imgsz=96, epochs=1, trainer=OwnTrainer)
        # Images may share micro-batches in any order; before the first batch, bn_group=auto runs a few.
        sums.append(sorted(run.sums[-trainings.IMAGES :]))
        assert OwnTrainer.updated == trainings.BATCHES
    assert sums[0] == sums[1] == sums[2]


def test_a_trainer_trains_once_more(trainings, small_model, tmp_path):
    """The second training goes on with the weights of the first, for example in a notebook."""
    weights = []
    for name, settings in (("stock", {"mas": False}), ("ours", {"bn_group": 8, "micro_batch": 8})):
        arguments = {**trainings.TINY, **settings, "epochs": 1, "mosaic": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}
        arguments |= {"translate": 0.0, "scale": 0.0, "fliplr": 0.0}
        trainer = DetectionTrainer(overrides={**arguments, "model": small_model, "project": str(tmp_path / name)})
        for _ in range(2):
            trainer.train()
            weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        assert "preprocess_batch" not in vars(trainer)
    first, second, *ours = weights
    assert all(map(torch.equal, ours[0], first))
    assert all(map(torch.equal, ours[1], second))
    assert not all(map(torch.equal, first, second))


def test_a_trainer_can_train_again_after_an_error_of_a_callback_at_its_end(trainings, small_model, tmp_path):
    def fail(trainer):
        raise ValueError

    trainer = DetectionTrainer(overrides={**trainings.TINY, "model": small_model, "project": str(tmp_path)})
    trainer.add_callback("on_train_start", fail)
    trainer.add_callback("teardown", fail)
    with pytest.raises(ValueError):  # noqa: PT011
        trainer.train()
    assert not {"preprocess_batch", "run_callbacks", "optimizer_step"} & vars(trainer).keys()


_WITHOUT_A_MODULE = """
class Trainer(DetectionTrainer):
    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        batch["img"] = batch["img"] * 0.5
        return batch

    def build_dataset(self, *args, **kwargs):
        dataset = super().build_dataset(*args, **kwargs)
        dataset.collate_fn = lambda samples, collate=dataset.collate_fn: collate(samples)
        return dataset

class Loss(v8DetectionLoss):
    def __call__(self, predictions, batch):
        loss, items = super().__call__(predictions, batch)
        return 2 * loss, items

def put(trainer):
    trainer.model.criterion = Loss(trainer.model)
    layer = trainer.model.model[1]
    layer.forward = lambda images, forward=layer.forward: forward(images)
"""


def test_code_without_a_module_trains_as_on_stock(trainings, small_model, tmp_path, assert_same_weights):
    """`exec` in a namespace without `__name__`, as in programs that run snippets of their users."""
    runs = []
    for settings in ({"mas": False}, {"bn_group": 8, "micro_batch": 8}):
        names = {"DetectionTrainer": DetectionTrainer, "v8DetectionLoss": v8DetectionLoss}
        exec(_WITHOUT_A_MODULE, names)
        assert "__name__" not in names
        put = [("on_train_start", names["put"])]
        more = {"epochs": 1, "save": False, "val": False}
        run = trainings.train(tmp_path, small_model, **settings, **more, trainer=names["Trainer"], callbacks=put)
        runs.append(run)
    assert "the loss is not one of Ultralytics' own" in runs[1].log
    assert_same_weights(runs[1], runs[0])
