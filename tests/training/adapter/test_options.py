"""Split batches together with Ultralytics' arguments that change the content or the number of batches."""

import torch


def test_frozen_layers_stay_as_they_were(trainings, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, freeze=2, epochs=1)
    before, after = run.before, run.after
    frozen = [name for name in before if name.startswith(("model.0.", "model.1."))]
    assert any("running_var" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["model.2.cv1.conv.weight"], after["model.2.cv1.conv.weight"])
    assert not torch.equal(before["model.2.cv1.bn.running_mean"], after["model.2.cv1.bn.running_mean"])


def test_multi_scale_draws_a_size_a_batch_as_ultralytics_does(trainings, tmp_path):
    """The warm-up of bn_group=auto draws no size either."""
    stock = trainings.train(tmp_path, mas=False, multi_scale=0.5, imgsz=96)
    for settings in (trainings.SPLIT, {"micro_batch": 2}):
        run = trainings.train(tmp_path, **settings, multi_scale=0.5, imgsz=96)
        sizes = [f"{height}x{width}" for _, height, width in stock.seen]
        assert len(set(sizes)) > 2
        assert [row["image_size"] for row in run.memory] == sizes
        parts = run.seen[-len(stock.seen) * 4 :]
        assert parts == [(2, height, width) for _, height, width in stock.seen for _ in range(4)]
        assert run.draws == stock.draws
        assert run.micro_batches() == [[2] * 4] * len(sizes)


def test_time_ends_a_run(trainings, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, epochs=500, time=1 / 3600)
    assert 1 <= len(run.results) < 500
    assert len(run.memory) == run.steps


def test_without_validation_results_keep_their_columns(trainings, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, val=False, epochs=3)
    assert len(run.results) == 3  # the rows have been read with a number in every column
    assert all(row["memory/micro_batch"] == 2 for row in run.results)
    assert "metrics/mAP50(B)" in run.results[0]


def test_rectangular_batches(trainings, tmp_path):
    data = trainings.draw_data(tmp_path / "data", sizes=[(64, 128), (128, 64)])
    run = trainings.train(tmp_path, **trainings.SPLIT, data=data, rect=True, imgsz=128, epochs=1)
    stock = trainings.train(tmp_path, mas=False, data=data, rect=True, imgsz=128, epochs=1)
    assert [row["image_size"] for row in run.memory] == [f"{height}x{width}" for _, height, width in stock.seen]
    assert len({row["image_size"] for row in run.memory}) == 2
    assert run.batches(8) == stock.batches(8)


def test_accumulated_batches_are_one_row(trainings, tmp_path):
    run = trainings.train(tmp_path, **trainings.SPLIT, nbs=32)
    assert run.steps == 2
    assert [int(row["images"]) for row in run.memory] == [32, 32]
    assert run.micro_batches() == [[2] * 16] * 2
    assert run.summary["images"] == 64
