"""`augment_on=device`: a whole training sees the images of the host."""

import pytest

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
