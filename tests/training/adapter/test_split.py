"""A training with split batches does everything that the same training without the engine does."""

import pytest


@pytest.fixture(scope="module")
def stock(trainings, tmp_path_factory):
    return trainings.train(tmp_path_factory.mktemp("stock"), mas=False, plots=True, close_mosaic=1)


@pytest.fixture(scope="module")
def split(trainings, tmp_path_factory):
    metrics = []
    logger = ("on_fit_epoch_end", lambda trainer: metrics.append(dict(trainer.metrics)))
    run = trainings.train(
        tmp_path_factory.mktemp("split"), **trainings.SPLIT, plots=True, close_mosaic=1, callbacks=[logger]
    )
    run.logged = metrics
    return run


def test_updates_are_those_of_ultralytics(trainings, stock, split):
    assert split.steps == stock.steps == 2 * trainings.BATCHES
    assert split.trainer.ema.updates == stock.trainer.ema.updates == 2 * trainings.BATCHES
    assert split.calls == stock.calls
    assert split.calls["on_train_batch_end"] == 2 * trainings.BATCHES


def test_every_image_is_seen_once_in_its_batch(trainings, stock, split):
    assert split.seen == [(2, 64, 64)] * (4 * len(stock.seen))
    assert split.batches(8) == stock.batches(8)
    assert split.draws == stock.draws


def test_memory_csv_has_a_row_for_every_update(trainings, split):
    rows = split.memory
    assert [int(row["step"]) for row in rows] == list(range(1, 2 * trainings.BATCHES + 1))
    assert [int(row["epoch"]) for row in rows] == [1] * trainings.BATCHES + [2] * trainings.BATCHES
    assert split.micro_batches() == [[2, 2, 2, 2]] * len(rows)
    assert sum(int(row["images"]) for row in rows) == 2 * trainings.IMAGES
    for row in rows:
        assert row["image_size"] == "64x64"
        assert 0 < float(row["peak_mib"]) <= float(row["budget_mib"]) < 2**30
        assert float(row["step_ms"]) > 0
        slowest, fastest = (8000 / (float(row["step_ms"]) + rounding) for rounding in (0.051, -0.051))
        assert slowest - 0.051 <= float(row["images_per_s"]) <= fastest + 0.051
        assert row["events"] == ""


def test_results_csv_has_the_memory_beside_what_ultralytics_writes(stock, split):
    added = ["memory/peak_MiB", "memory/budget_MiB", "memory/micro_batch"]
    assert [name for name in split.results[0] if name not in added] == list(stock.results[0])
    rows = [row for row in split.memory if row["epoch"] == "1"]
    highest = max(float(row["peak_mib"]) for row in rows)
    first_epoch = split.results[0]
    assert [first_epoch[name] for name in added] == [
        pytest.approx(highest, rel=1e-5), pytest.approx(float(rows[-1]["budget_mib"]), rel=1e-5), 2
    ]  # fmt: skip


def test_loggers_get_the_memory(split):
    assert len(split.logged) == 3  # the last entry is the validation of best.pt
    for metrics in split.logged[:2]:
        assert metrics["memory/micro_batch"] == 2
        assert 0 < metrics["memory/peak_MiB"] < metrics["memory/budget_MiB"]
        assert all(isinstance(value, (int, float)) for value in metrics.values())


def test_pictures_of_batches_are_the_same_to_the_pixel(trainings, tmp_path, stock, split):
    """Batches without BatchNorm groups are not arranged."""
    alike = trainings.train(tmp_path, bn_group=0, micro_batch=2, plots=True, close_mosaic=1)
    pictures = sorted(file.name for file in stock.folder.glob("train_batch*.jpg"))
    # The last three are from the epoch without mosaic.
    assert pictures == [f"train_batch{number}.jpg" for number in (0, 1, 2, 4, 5, 6)]
    for name in pictures:
        assert (alike.folder / name).read_bytes() == (stock.folder / name).read_bytes(), name
    assert {file.name for file in split.folder.iterdir()} - {file.name for file in stock.folder.iterdir()} == {
        "memory.csv", "memory.json", "memory.png"
    }  # fmt: skip


def test_mosaic_is_closed(trainings, split):
    assert "Closing dataloader mosaic" in split.log
    assert split.log.index("Closing dataloader mosaic") < split.log.index("2 epochs completed")
    boxes = [float(row["max_boxes"]) for row in split.memory]
    assert boxes[trainings.BATCHES :] != boxes[: trainings.BATCHES]


def test_class_weights_and_cached_images(trainings, split, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, cls_pw=0.5, cache="ram", amp=False, epochs=1)
    assert "Class weights: [" in run.log
    assert "GB RAM" in run.bar
    assert run.results[0]["train/cls_loss"] != split.results[0]["train/cls_loss"]
    assert run.results[0]["train/cls_loss"] == pytest.approx(split.results[0]["train/cls_loss"], rel=0.3)
