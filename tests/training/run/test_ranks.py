"""Whole trainings in several processes, over gloo on the CPU."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG

from yolov12.errors import ConfigError
from yolov12.training.classes import table
from yolov12.training.run import process_group

RANK = Path(__file__).with_name("rank.py")
PLAIN = {"mosaic": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "fliplr": 0, "translate": 0, "scale": 0}
"""Arguments without augmentation: one process arranges a batch by the boxes after it, several by those before it."""


@pytest.fixture(scope="module")
def start(start_script, reserve_port):
    """Start a process for each rank and return the processes."""

    def start_ranks(size, *command, **environment):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port()), "WORLD_SIZE": str(size)}
        place |= {"LOCAL_WORLD_SIZE": str(size)}
        return [
            start_script(*command, **place, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(size)
        ]

    return start_ranks


def finish(processes, timeout_s=800):
    """Wait for processes; return their exit statuses and their outputs."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def weights(tiny_model, tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "begin.pt"
    YOLO(tiny_model).save(file)
    return file


@pytest.fixture(scope="module")
def settings(trainings, tmp_path_factory):
    """Arguments for 32 images with large boxes, which no augmentation drops, so that all ranks know their number."""
    data = trainings.draw_data(tmp_path_factory.mktemp("data") / "images", sizes=((64, 64),) * 4)
    # These sizes keep rounding errors small, which BatchNorm over few values would amplify.
    calm = {"imgsz": 128, "batch": 16, "nbs": 16, "bn_group": 4, "lr0": 0.002, "amp": False}
    own = {"data": data, "name": "run", **calm}
    return lambda folder, **more: {**trainings.TINY, **PLAIN, **own, "project": str(folder), **more}


@pytest.fixture(scope="module")
def alone(start_script, settings, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    process = start_script(RANK, weights, json.dumps(settings(folder)), folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return torch.load(folder / "0.pt", weights_only=True)


def results(folder):
    header, *rows = csv.reader((Path(folder) / "results.csv").read_text().splitlines())
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]


def rows(folder, rank):
    """Return the rows of a rank's journal."""
    name = f"memory.rank{rank}.csv" if rank else "memory.csv"
    return list(csv.DictReader((Path(folder) / name).read_text().splitlines()))


def assert_moved_alike(found, wanted, weights):
    """Compare weights and statistics after a training, relative to how far it moved them."""
    begin = YOLO(weights).model.float().state_dict()
    # The last layers of the head are made anew for the number of classes.
    names = [name for name, value in begin.items() if value.is_floating_point() and value.shape == wanted[name].shape]
    for kind in (["running_mean"], ["running_var"], ["weight", "bias"]):
        chosen = [name for name in names if name.rpartition(".")[2] in kind]
        one, other, before = (torch.cat([state[name].flatten() for name in chosen]) for state in (found, wanted, begin))
        assert (one - other).norm() <= 1e-5 * (other - before).norm(), kind  # measured: 1e-7


@pytest.mark.parametrize(("size", "takes"), [(2, -1), (3, 0)])
def test_a_run_in_several_processes_ends_as_in_one(start, settings, weights, alone, tmp_path, size, takes):
    """Three ranks have unequal shares, of 8, 4 and 4 images, and on one of them a callback takes batches."""
    arguments = settings(tmp_path)
    codes, outputs = finish(start(size, RANK, weights, json.dumps(arguments), tmp_path, TAKES=str(takes)))
    assert codes == [0] * size, "\n".join(outputs)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    assert_moved_alike(found[0]["weights"], alone["weights"], weights)
    for name in alone["weights"]:
        assert all(torch.equal(f["weights"][name], found[0]["weights"][name]) for f in found)
    assert all(torch.equal(f["ema"][name], value) for f in found for name, value in found[0]["ema"].items())
    for row, wanted in zip(results(found[0]["folder"]), results(alone["folder"]), strict=True):
        for name, value in wanted.items():
            if name != "time" and not name.startswith("memory/"):
                # Ranks validate in smaller batches, and Ultralytics divides the loss of each by its own objects.
                rel = 5e-3 if name.startswith("val/") else 2e-3
                assert row[name] == pytest.approx(value, rel=rel, abs=2e-3), name


@pytest.mark.parametrize("stop", ["[]", pytest.param("[4]", marks=pytest.mark.deep)])
def test_ranks_replay_what_one_process_replays(start, start_script, trainings, tiny_model, settings, tmp_path, stop):
    """Each image is on one of two ranks, also after an interruption in mid-epoch, and the table of classes is made."""
    torch.manual_seed(0)
    yolo = YOLO(tiny_model)
    yolo.model.names = {index: "odd" if index == 3 else f"other {index}" for index in range(10)}
    yolo.save(begin := tmp_path / "begin.pt")
    old = trainings.draw_data(tmp_path / "old", sizes=((64, 64),) * 3)
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        command = RANK, begin, json.dumps(settings(folder, replay=old, replay_fraction=0.2, resume="auto")), folder
        if size == 1:
            codes, outputs = finish([start_script(*command)])
        else:
            codes, outputs = finish(start(size, *command, STOP=stop))
            if stop != "[]":
                assert all(codes), "\n".join(outputs)
                assert all("KeyboardInterrupt" in output for output in outputs), "\n".join(outputs)
                codes, outputs = finish(start(size, *command))
        assert codes == [0] * size, "\n".join(outputs)
        found.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)])
    (alone,), ranks = found
    together = [sorted(one + other) for one, other in zip(*(rank["images"] for rank in ranks), strict=True)]
    wanted = [sorted(batch) for batch in alone["images"]]
    assert together == wanted[len(wanted) - len(together) :]
    assert [len(batch) for batch in wanted] == [16, 16, 8] * 2  # 32 new images and 8 of 24 old ones in each epoch
    for epoch in ([name for batch in part for name in batch] for part in (wanted[:3], wanted[3:])):
        assert len(set(epoch)) == 40
        assert sum(name.startswith("old") for name in epoch) == 8
    assert_moved_alike(ranks[0]["weights"], alone["weights"], begin)
    one, other = (table.read(tmp_path / size / "run" / "classes.csv") for size in "12")
    assert [(row.name, row.known, row.objects) for row in one] == [(row.name, row.known, row.objects) for row in other]
    assert [(row.name, row.known) for row in one] == [("even", False), ("odd", True)]


def test_the_other_ranks_end_soon_and_name_the_rank_that_died(start, settings, weights, tmp_path):
    arguments = settings(tmp_path, epochs=50)
    processes = start(4, RANK, weights, json.dumps(arguments), tmp_path, KILL="[2, 3]")
    assert processes[2].wait(800) == -signal.SIGKILL
    codes, outputs = finish([process for process in processes if process is not processes[2]])
    assert all(code == 1 for code in codes), outputs
    assert all("rank 2 (" in output and "has not been heard of" in output for output in outputs), outputs
    assert (tmp_path / "run" / "weights" / "state.pt").exists()


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_and_the_run_ends_as_if_not_interrupted(
    reserve_port, settings, weights, alone, tmp_path
):
    arguments = settings(tmp_path, resume="auto")
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--max-restarts=1",
        f"--master-port={reserve_port()}",
    ]
    done = subprocess.run(
        [sys.executable, *launch, RANK, weights, json.dumps(arguments), tmp_path],
        env={**os.environ, "KILL": "[1, 3]", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with" in done.stderr + done.stdout
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0]["folder"] == str(tmp_path / "run")
    assert_moved_alike(found[0]["weights"], alone["weights"], weights)
    for name in alone["weights"]:
        assert all(torch.equal(rank["weights"][name], found[0]["weights"][name]) for rank in found)
    assert len(results(found[0]["folder"])) == 2


def label_as_predicted(model, source, folder):
    """Return a data set whose boxes are predictions of a model, so that validation has something to count."""
    found = model.val(
        data=source, imgsz=128, batch=4, save_json=True, plots=False, device="cpu", workers=0, project=folder
    )
    predictions = json.loads((found.save_dir / "predictions.json").read_text())
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for file in sorted((Path(source).parent / "images").iterdir()):
        shutil.copy(file, folder / "images")
        lines = []
        for each in sorted(predictions, key=lambda each: -each["score"]):
            left, top, width, height = (pixels / 64 for pixels in each["bbox"])
            whole = min(left, top) > 0.01 and max(left + width, top + height) < 0.99  # of others the rest was cut off
            if str(each["image_id"]) == file.stem and whole:
                lines.append(f"{each['category_id'] - 1} {left + width / 2} {top + height / 2} {width} {height}")
        (folder / "labels" / f"{file.stem}.txt").write_text("\n".join(lines[:40]))
    (folder / "data.yaml").write_text(
        json.dumps({"path": str(folder), "train": "images", "val": "images", "names": {0: "even", 1: "odd"}})
    )
    return folder / "data.yaml"


def test_validation_in_several_processes_finds_what_one_finds(start, settings, weights, alone, tmp_path):
    model = YOLO(Path(alone["folder"]) / "weights" / "best.pt")
    head = model.model.model[-1]
    for scores, boxes in zip(head.cv3, head.cv2, strict=True):
        # That it is not sure of anything yet would leave nothing to count, nor would boxes larger than an image.
        torch.nn.init.normal_(scores[-1].weight, std=0.5)
        torch.nn.init.zeros_(scores[-1].bias)
        boxes[-1].bias.data.view(4, -1)[:, 2] += 10  # two cells to each side
    begin = tmp_path / "begin.pt"
    model.save(begin)
    data = label_as_predicted(YOLO(begin), settings(tmp_path)["data"], tmp_path / "predicted")
    arguments = settings(tmp_path, data=str(data), bn_group=2, epochs=1, save_json=True, batch=6, nbs=6)
    processes = start(3, RANK, begin, json.dumps(arguments), tmp_path, VALIDATE=str(begin))
    codes, outputs = finish(processes)  # the validation has eight batches of 4
    assert codes == [0] * 3, "\n".join(outputs)
    metrics = torch.load(tmp_path / "0.pt", weights_only=True)["metrics"]
    best = tmp_path / "run" / "weights" / "best.pt"
    one = YOLO(best).val(
        data=str(data), imgsz=128, batch=4, rect=True, save_json=True, plots=False, device="cpu", project=tmp_path,
        name="val", workers=0,
    )  # fmt: skip
    assert metrics["metrics/mAP50(B)"] > 0.01
    for name, value in one.results_dict.items():
        if name != "fitness":
            assert metrics[name] == pytest.approx(value, abs=1e-12), name
    predictions = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("run", "val")]
    assert len(predictions[0]) == len(predictions[1]) > 0
    assert predictions[0] == predictions[1]


def test_torchrun_runs_the_command_and_each_rank_keeps_a_journal(reserve_port, tiny_model, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={reserve_port()}", "-m", "yolov12"]
    words = ["device=cpu", "data=demo:images=41,val=0.2", "imgsz=64", "batch=8", "nbs=8", "epochs=1"]
    done = subprocess.run(
        [sys.executable, *launch, "train", f"model={tiny_model}", *words, f"project={tmp_path}", "name=run"],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Trained. Everything is in") == 1
    steps = [[int(row["images"]) for row in rows(tmp_path / "run", rank)] for rank in range(2)]
    assert [sum(shares) for shares in zip(*steps, strict=True)] == [8, 8, 8, 8, 1]  # the last has an image for one
    assert (tmp_path / "run" / "memory.png").exists()
    assert len(json.loads((tmp_path / "run" / "memory.json").read_text())["ranks"]) == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


def test_sigterm_ends_all_ranks_and_keeps_their_steps(start, settings, weights, tmp_path):
    """A launcher that is terminated terminates every rank."""
    processes = start(2, RANK, weights, json.dumps(settings(tmp_path, epochs=1000)), tmp_path)
    journal = tmp_path / "run" / "memory.csv"
    while not journal.exists() or len(rows(tmp_path / "run", 0)) < 5:
        assert [process.returncode for process in processes] == [None, None]
        time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert all(codes), outputs
    state = torch.load(tmp_path / "run" / "weights" / "state.pt", map_location="cpu", weights_only=True)
    steps = [len(rows(tmp_path / "run", rank)) for rank in range(2)]
    assert steps[0] == steps[1] or abs(steps[0] - steps[1]) == 1
    assert state["rows"] >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 1}, "batch=1 is less than an image for each of 2 processes"),
        ({"batch": 8, "bn_group": 8}, "bn_group=8: batch=8 has fewer groups than the 2 processes"),
        ({"batch": -1}, "batch=-1: for several processes give a number of images"),
    ],
)
def test_what_cannot_be_shared_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        process_group.check_batch(arguments, 2)


ONE = [None, "", 0, "0", "0,", (0,), [0], ["0"], "cuda:0", "cpu", "mps", -1, "-1", [-1]]
ONE += [torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")]
TWO = ["0,1", "0, 1", "0,1,", [0, 1], (0, 1), ["0", "1"], "cuda:0,cuda:1", "npu:0,1", "-1,-1", [-1, -1], [0, -1]]


@pytest.mark.parametrize("device", [*ONE, *TWO], ids=repr)
def test_a_batch_of_one_image_is_refused_where_ultralytics_starts_several_processes(device):
    """Ultralytics starts one for each device that it reads in the argument."""
    given = []

    def stock_init(trainer, cfg=DEFAULT_CFG, overrides=None, _callbacks=None):
        given.append(overrides["device"])

    refused = pytest.raises(ConfigError, match="each of 2 processes") if device in TWO else nullcontext()
    with refused:
        process_group.gather(stock_init, object(), overrides={"device": device, "batch": 1})
    assert given == ([] if device in TWO else [device])


def test_it_is_refused_before_anything_is_written(start, settings, weights, tmp_path):
    codes, outputs = finish(start(2, RANK, weights, json.dumps(settings(tmp_path, batch=1)), tmp_path))
    assert codes == [1, 1]
    assert all("batch=1 is less than an image for each of 2 processes" in output for output in outputs)
    assert not list(tmp_path.iterdir())


def test_shares_follow_speed_and_batches_stay_whole(start, settings, weights, tmp_path):
    """One of two ranks takes three times as long as the other."""
    arguments = settings(tmp_path, epochs=14, bn_group=2, val=False, plots=False)
    codes, outputs = finish(start(2, RANK, weights, json.dumps(arguments), tmp_path, SLOW="[1, 3]"))
    assert codes == [0, 0], "\n".join(outputs)
    steps = [[int(row["images"]) for row in rows(tmp_path / "run", rank)] for rank in range(2)]
    assert [sum(shares) for shares in zip(*steps, strict=True)] == [16] * len(steps[0])
    assert steps[0][0] == steps[1][0] == 8
    assert steps[1][-1] < 8
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True)["weights"] for rank in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_images_of_a_batch_are_of_one_size_on_all_ranks(start, settings, weights, tmp_path):
    """One rank has no memory for large images for a while, and prefetches more."""
    arguments = settings(tmp_path, epochs=18, val=False, plots=False, mas_min_imgsz=32)
    environment = {"NO_ROOM": "[1, 6]", "WORKERS": "[0, 1]"}
    codes, outputs = finish(start(2, RANK, weights, json.dumps(arguments), tmp_path, **environment))
    assert codes == [0, 0], "\n".join(outputs)
    sizes = [[row["image_size"] for row in rows(tmp_path / "run", rank)] for rank in range(2)]
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == "64x64"
    assert sizes[0][-1] == "128x128"
    assert "96x96" in sizes[0]


def test_a_death_in_validation_is_named_too(start, settings, weights, tmp_path):
    processes = start(3, RANK, weights, json.dumps(settings(tmp_path, epochs=3)), tmp_path, KILL_IN_VAL="1")
    assert processes[1].wait(800) == -signal.SIGKILL
    codes, outputs = finish([processes[0], processes[2]])
    assert codes == [1, 1], outputs
    assert all("rank 1 (" in output and "has not been heard of" in output for output in outputs), outputs


def test_a_run_resumes_at_a_short_last_batch_without_images_for_some_ranks(start, settings, weights, tmp_path):
    """With 20 images in batches of 16, the second batch has one group for three ranks."""
    data = Path(settings(tmp_path)["data"]).parent
    lines = [str(file) for file in sorted((data / "images").iterdir())[:20]]
    (tmp_path / "some.txt").write_text("\n".join(lines))
    some = {"path": str(data), "train": str(tmp_path / "some.txt"), "val": "images", "names": {0: "even", 1: "odd"}}
    (tmp_path / "some.yaml").write_text(json.dumps(some))
    arguments = settings(tmp_path / "runs", data=str(tmp_path / "some.yaml"), resume="auto", epochs=2)
    codes, outputs = finish(start(3, RANK, weights, json.dumps(arguments), tmp_path, STOP="[3]"))
    assert all(codes), outputs
    assert all("KeyboardInterrupt" in output for output in outputs), "\n".join(outputs)
    codes, outputs = finish(start(3, RANK, weights, json.dumps(arguments), tmp_path))
    assert codes == [0] * 3, "\n".join(outputs)
    assert "resume: epoch 2, after batch 1 of 2" in outputs[0], outputs[0]
    steps = [[int(row["images"]) for row in rows(tmp_path / "runs" / "run", rank)] for rank in range(3)]
    assert [sum(shares) for shares in zip(*steps, strict=True)] == [16, 4, 16, 4]


def test_a_batch_larger_than_the_data_is_shared_out(start, trainings, tiny_models, tmp_path):
    """In training and in validation, also where the terms of a loss have normalisers of their own."""
    arguments = {**trainings.TINY, **PLAIN, "data": trainings.draw_data(tmp_path / "data", "segment", [(64, 64)] * 4)}
    arguments |= {"batch": 64, "nbs": 64, "epochs": 1, "lr0": 1e-4, "bn_group": 4, "name": "run"}
    torch.manual_seed(0)
    YOLO(tiny_models["segment"]).save(begin := tmp_path / "begin.pt")
    command = RANK, begin, json.dumps({**arguments, "project": str(tmp_path)}), tmp_path
    codes, outputs = finish(start(2, *command))
    assert codes == [0, 0], "\n".join(outputs)
    assert [int(rows(tmp_path / "run", rank)[0]["images"]) for rank in range(2)] == [16, 16]
    alone = trainings.train(tmp_path / "alone", begin, **arguments)
    (found,), (wanted,) = results(tmp_path / "run"), results(alone.folder)
    for name in ("box_loss", "seg_loss", "cls_loss", "dfl_loss"):
        assert found[f"val/{name}"] == pytest.approx(wanted[f"val/{name}"], rel=1e-4), name


def test_all_ranks_agree_on_the_number_of_epochs(start, settings, weights, tmp_path):
    """With `time`, Ultralytics estimates the number from each rank's own clock. Here, rank 1 has a fast one."""
    arguments = settings(tmp_path, time=20 / 3600, plots=False)
    codes, outputs = finish(start(2, RANK, weights, json.dumps(arguments), tmp_path, CLOCK="[1, 3]"))
    assert codes == [0, 0], "\n".join(outputs)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0]["rates"] == found[1]["rates"]
    assert len(found[0]["rates"]) > 4
