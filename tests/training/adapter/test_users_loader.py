"""What users do to the loader of a training and to its data set: copy, set, replace."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.models.yolo.detect import DetectionTrainer

_NO_AUGMENTATION = {"mosaic": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "translate": 0.0, "scale": 0.0}
_SETTINGS = {**_NO_AUGMENTATION, "fliplr": 0.0}


def test_the_data_set_can_be_copied(trainings, small_model, tmp_path):
    found = []

    def look(trainer):
        dataset = trainer.train_loader.dataset
        for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
            batch = next(iter(DataLoader(other, batch_size=4, collate_fn=other.collate_fn)))
            found.append(torch.equal(batch["img"], dataset.collate_fn([dataset[i] for i in range(4)])["img"]))

    trainings.train(
        tmp_path, small_model, epochs=1, callbacks=[("on_train_start", look), ("on_train_epoch_end", look)], **_SETTINGS
    )
    assert found == [True] * 4


def test_the_loader_is_one_of_pytorch_for_users(trainings, small_model, tmp_path):
    refused, keys = [], []

    def look(trainer):
        loader = trainer.train_loader
        assert isinstance(loader, DataLoader)
        assert isinstance(loader, InfiniteDataLoader)
        for name in ("dataset", "batch_size", "sampler"):
            with pytest.raises(ValueError, match="initialized"):
                setattr(loader, name, None)
            refused.append(name)
        loader.of_a_user = 3
        assert loader.of_a_user == 3
        assert copy.copy(loader).dataset is loader.dataset
        keys.append(set(loader.collate_fn([loader.dataset[0]])))

    run = trainings.train(tmp_path, small_model, epochs=1, callbacks=[("on_train_start", look)])
    assert len(refused) == 3
    assert not any(key.startswith("yolov12") for key in keys[0])
    assert len(run.results) == 1


@pytest.mark.parametrize("reset", [False, True])
def test_a_collate_function_that_a_callback_sets_is_called(trainings, small_model, tmp_path, reset):
    called = {}

    def collate(stock, calls, samples):
        calls.append(len(samples))
        batch = stock(samples)
        return {**batch, "img": 255 - batch["img"]}

    def train(settings):
        calls = called.setdefault(str(settings), [])

        def replace(trainer):
            if trainer.epoch == 1:
                trainer.train_loader.collate_fn = partial(collate, trainer.train_loader.collate_fn, calls)
                if reset:
                    trainer.train_loader.reset()

        callbacks = [("on_train_epoch_start", replace)]
        return trainings.train(tmp_path, small_model, callbacks=callbacks, **settings, **_SETTINGS)

    stock, ours = train({"mas": False}), train({"bn_group": 8, "micro_batch": 8})
    in_stock, in_ours = called.values()
    assert in_ours == in_stock == ([8] * trainings.BATCHES if reset else [])  # PyTorch's iterator keeps the old one
    assert sum(ours.sums) == pytest.approx(sum(stock.sums))


def plain(trainer):
    dataset = trainer.train_loader.dataset
    return DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)


class Around:
    """Loader around another one, which makes its batches itself."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return 2

    def __iter__(self):
        draw = torch.Generator().manual_seed(0)
        for _ in range(2):
            yield {
                "img": torch.randint(0, 255, (8, 3, 64, 64), generator=draw, dtype=torch.uint8),
                "cls": torch.zeros(8, 1),
                "bboxes": torch.full((8, 4), 0.4),
                "batch_idx": torch.arange(8.0),
            }


@pytest.mark.parametrize("make", [plain, lambda trainer: Around(trainer.train_loader)], ids=["plain", "around"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_that_a_callback_puts_in_the_place_of_ours(
    trainings, small_model, tmp_path, assert_same_weights, make, epoch
):
    """It has no place in the run that could be saved, so a resume goes on from the last complete epoch."""

    def replace(trainer):
        if trainer.epoch == epoch:
            trainer.train_loader = make(trainer)

    def state(trainer):
        states.append((trainer.wdir / "state.pt").stat().st_mtime_ns if (trainer.wdir / "state.pt").exists() else None)

    states = []
    callbacks = [("on_train_epoch_start", replace)]
    stock = trainings.train(tmp_path, small_model, callbacks=callbacks, mas=False, draws_by_place=False, **_SETTINGS)
    callbacks += [("on_train_epoch_start", state), ("on_train_batch_end", state)]
    settings = {"bn_group": 8, "micro_batch": 8, "save_every": 1, **_SETTINGS}
    ours = trainings.train(tmp_path, small_model, callbacks=callbacks, **settings)
    assert_same_weights(ours, stock)
    begin = states.index(None) if epoch == 0 else len(states) // 2
    assert len(set(states[begin + 1 :])) == 1


class Scaled(DetectionTrainer):
    """Notes the sizes that `multi_scale` draws."""

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        self.sizes = [*getattr(self, "sizes", []), batch["img"].shape[-1]]
        return batch


def test_multi_scale_draws_a_size_for_each_batch_of_such_a_loader(trainings, small_model, tmp_path):
    def replace(trainer):
        if trainer.epoch == 1:
            trainer.train_loader = plain(trainer)

    run = trainings.train(
        tmp_path, small_model, trainer=Scaled, imgsz=256, epochs=4, multi_scale=0.5, bn_group=8,
        callbacks=[("on_train_epoch_start", replace)],
    )  # fmt: skip
    assert len(set(run.trainer.sizes[trainings.BATCHES :])) > 1
