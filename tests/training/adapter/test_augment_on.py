"""`augment_on=device`: a whole training sees the images of the host."""

import pytest
import torch

from yolov12.training.data import device_rendering

AUGMENTED = {"mosaic": 1.0, "mixup": 0.3, "degrees": 10.0, "flipud": 0.3, "bgr": 0.3, "close_mosaic": 1}


def test_a_training_is_that_of_the_host_to_rounding(trainings, tmp_path):
    host = trainings.train(tmp_path, augment_on="host", **AUGMENTED, **trainings.SPLIT)
    run = trainings.train(tmp_path, augment_on="device", plots=True, **AUGMENTED, **trainings.SPLIT)
    assert run.micro_batches() == host.micro_batches()
    assert run.seen == host.seen
    assert run.draws == host.draws
    # Pixels have values from 0 to 1. A tenth of them may be one of 255 more or less.
    assert run.sums == pytest.approx(host.sums, abs=0.1 * 3 * 64 * 64 / 255)
    assert run.sums != host.sums
    assert run.results[-1]["train/box_loss"] == pytest.approx(host.results[-1]["train/box_loss"], rel=0.05)
    assert (run.folder / "train_batch0.jpg").exists()
    assert run.args["augment_on"] == "device"


class Around:
    """A loader of the user's own that writes on the images of another one."""

    def __init__(self, inner):
        self._inner = inner

    def __len__(self):
        return len(self._inner)

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __iter__(self):
        for batch in self._inner:
            batch["img"][1][:, 10:40] = 7
            for image in batch["img"]:
                image[:, :5] = 200
            yield batch


def put_around(trainer):
    trainer.train_loader = Around(trainer.train_loader)


@pytest.mark.deep
@pytest.mark.parametrize(
    "change",
    [{"callbacks": [("on_train_start", put_around)]}, {"multi_scale": 0.5}, {"perspective": 1e-3, "cutmix": 0.5}],
)
def test_what_a_user_changes_changes_both(trainings, tmp_path, change):
    host, device = (trainings.train(tmp_path, augment_on=where, **AUGMENTED, **change) for where in ("host", "device"))
    assert device.seen == host.seen
    assert device.sums == pytest.approx(host.sums, abs=0.1 * 3 * 96 * 96 / 255)


@pytest.mark.deep
def test_a_failed_allocation_of_the_rendering_is_retried(trainings, tmp_path, monkeypatch):
    rendered, tries = device_rendering.rendered, []

    def fifth_fails(packed):
        tries.append(packed)
        if len(tries) == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return rendered(packed)

    monkeypatch.setattr(device_rendering, "rendered", fifth_fails)
    run = trainings.train(tmp_path, augment_on="device", epochs=1, bn_group=2, micro_batch=4)
    assert "1 out-of-memory survived, 0 images lost, 4 of 4 updates" in run.log
