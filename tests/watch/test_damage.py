"""What happens to a watch on a machine that nobody looks after: power losses, full disks, links, and odd files."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.watch.factory import Work
from yolov12.errors import DataError, UnreadableWeightsError
from yolov12.watch import child, damage, loop, moves, states
from yolov12.watch.inbox import Inbox
from yolov12.watch.samples import UnusableError, check_image, read_label
from yolov12.watch.states import Outcome, Phase, State


def go_to(watch, phase):
    for _ in range(20):
        if watch.state.phase is phase:
            return
        watch.step()
    raise AssertionError(watch.state)


def put(factory, name, image=b"no image", label=""):
    (factory.inbox / f"{name}.png").write_bytes(image)
    (factory.inbox / f"{name}.txt").write_text(label)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_a_log_that_cannot_be_written_does_not_stop_the_watch(number, factory, monkeypatch):
    class Log(io.StringIO):
        def flush(self):
            raise OSError(number, "cannot be written")

    factory.deliver(4)
    put(factory, "damaged")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Log())
        assert factory.watch(Work()).run() == 0
    assert factory.serving.read_text().startswith("candidate")
    assert len([*(factory.work / "rejected").iterdir()]) == 3


def test_a_log_that_does_not_know_all_letters_does_not_stop_the_watch(factory, monkeypatch):
    put(factory, "日本")
    log = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", log)
        assert factory.watch(Work()).run() == 0
    assert b"\\u65e5\\u672c.png was set aside" in log.buffer.getvalue()


def test_folders_that_somebody_removes_from_a_full_disk_are_made_again(factory):
    watch = factory.watch(Work())
    put(factory, "first")
    factory.deliver()
    watch.step()
    for name in ("rejected", "dataset/received", "history"):
        shutil.rmtree(factory.work / name, ignore_errors=True)
    put(factory, "second", b"another")
    watch._is_interrupted = True  # as after an error
    factory.deliver(3)
    assert watch.run() == 0
    assert [*factory.inbox.iterdir()] == []
    assert len([*(factory.work / "rejected").iterdir()]) == 3
    assert len(factory.attempts()) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 4096], ids=["empty", "zeros"])
def test_a_state_file_without_content_begins_anew_with_another_number(content, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (factory.work / "state.json").write_bytes(content)
    assert factory.watch(Work()).run() == 0
    assert [attempt.name[:4] for attempt in factory.attempts()] == ["0001", "0002"]
    assert factory.serving.read_text() == f"candidate of {factory.attempts()[1].name}"


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.JUDGING, Phase.PROMOTING])
@pytest.mark.parametrize("name", ["attempt.json", "before.pt", "candidate.pt"])
def test_an_attempt_with_a_file_that_is_gone_or_empty_begins_again(name, phase, factory, capsys):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    (watch.attempt / name).write_bytes(b"")
    run = watch.attempt / "run"
    run.mkdir()
    states.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": phase}))
    work = Work()
    assert factory.watch(work).run() == 0
    assert factory.serving.read_text().startswith("candidate")
    assert json.loads((factory.attempts()[0] / "report.json").read_text())["outcome"] == "promoted"
    if phase is not Phase.TRAINING or name != "candidate.pt":
        assert "of attempt 1 is gone" in capsys.readouterr().out
        assert "training" in work.started
        assert not run.exists()  # its weights are of other images


@pytest.mark.parametrize("name", ["data.yaml", "train.txt", "val.txt"])
def test_an_attempt_whose_list_of_images_is_empty_begins_again(name, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (watch.attempt / name).write_bytes(b"")
    assert factory.watch(Work()).run() == 0
    assert (watch.attempt / name).read_text()
    assert len(factory.attempts()) == 1


def test_a_candidate_whose_verdict_is_gone_is_not_promoted_without_another(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    (watch.attempt / "verdict.json").write_bytes(b"")
    states.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": Phase.PROMOTING}))
    watch = factory.watch(work := Work(better=False))
    assert watch.run() == 0
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == "first"


@pytest.mark.parametrize("name", ["attempt.json", "verdict.json"])
def test_an_attempt_with_a_file_that_is_cut_off_goes_on(name, factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    whole = (watch.attempt / name).read_text()
    (watch.attempt / name).write_text(whole[: len(whole) // 2])
    assert factory.watch(Work()).run() == 0
    assert json.loads((watch.attempt / "report.json").read_text())["outcome"] == "promoted"
    (watch.attempt / "verdict.json").write_text("[]")
    damage.drop_damaged(watch.attempt / "verdict.json")
    assert not (watch.attempt / "verdict.json").exists()


def test_class_names_that_are_gone_come_from_the_attempts(factory):
    (factory.inbox / "classes.txt").write_text("dent\n")
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    data = factory.work / "dataset" / "data.yaml"
    for break_it in (data.unlink, data.touch):
        break_it()
        if data.exists():
            data.write_bytes(b"")
        assert factory.watch(Work()).collection.names == ["missing", "crack", "dent"]
        assert yaml.safe_load(data.read_text())["names"] == {0: "missing", 1: "crack", 2: "dent"}
    next((factory.work / "dataset" / "labels").rglob("*.txt")).write_text(" \n2 0.5 0.5 0.1 0.1\n")  # by hand
    data.unlink()
    assert len(factory.watch(Work()).collection.names) == 3
    data.unlink()
    shutil.rmtree(factory.work / "history")
    with pytest.raises(DataError, match=r"no attempt in .*history has the name"):
        factory.watch(Work())


def test_lists_that_are_damaged_do_not_stop_the_watch(factory):
    factory.deliver(4)
    put(factory, "damaged")
    assert factory.watch(Work()).run() == 0
    (factory.work / "used.txt").write_bytes(b"\xff\xfe")
    next((factory.work / "rejected").glob("*.reason.txt")).write_bytes(b"x.png: gepr\xfcft")
    (factory.work / "dataset" / "images" / "train" / "\udcffx.png").write_bytes(b"x")
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 2


def test_a_file_that_is_too_large_is_set_aside_without_reading_it(factory, monkeypatch):
    monkeypatch.setattr(loop, "LARGEST_IMAGE", 1 << 20)
    put(factory, "huge")
    os.truncate(factory.inbox / "huge.png", 5 << 20)
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    (note,) = (factory.work / "rejected").glob("*.reason.txt")
    assert "5 MiB: at most 1 MiB" in note.read_text()
    assert len(factory.attempts()) == 1


def test_an_image_for_which_there_is_no_memory_stays_and_is_taken_later(factory, monkeypatch, capsys):
    factory.deliver(4)
    stock = Image.open

    def opened(data):
        if data.getvalue() == large:
            raise MemoryError
        return stock(data)

    large = (factory.inbox / "1.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        assert factory.watch(Work(), "min_images=3").run() == 1
    assert "1.png stays in the inbox: there is not enough memory" in capsys.readouterr().out
    assert len(factory.attempts()) == 1
    assert factory.watch(Work()).run() == 0
    assert [*factory.inbox.iterdir()] == []


def test_images_that_cannot_be_moved_are_tried_less_and_less_often(factory, monkeypatch):
    factory.deliver(150)
    tries = []

    def rename(source, target):
        tries.append(Path(source).name)
        raise PermissionError(13, "not yours", str(source))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        watch = factory.watch(Work())
        for _ in range(200):
            watch.step()
            factory.now += 5
    assert len(set(tries)) == 150
    assert len(tries) < 150 * 10  # each try writes a label
    factory.now += 600
    for _ in range(3):
        watch.step()
    assert [*factory.inbox.iterdir()] == []


def test_pairs_that_are_sent_again_and_again_fill_no_disk(factory):
    factory.deliver(1)
    image, label = ((factory.inbox / f"0{suffix}").read_bytes() for suffix in (".png", ".txt"))
    watch = factory.watch(Work())
    watch.step()
    for _ in range(6):
        put(factory, "0", image, label.decode())
        watch.step()
    rejected = factory.work / "rejected"
    assert len([*rejected.iterdir()]) <= 6
    put(factory, "0", image, "1 0.5 0.5 0.2 0.2")  # another label: nothing of it is lost
    watch.step()
    assert {file.read_text() for file in rejected.glob("*.txt") if "reason" not in file.name} == {
        label.decode(),
        "1 0.5 0.5 0.2 0.2",
    }


def test_an_image_with_another_ending_keeps_the_label_that_was_set_aside(factory):
    for ending, label in (("png", "7 1"), ("bmp", "7 2")):
        (factory.inbox / f"a.{ending}").write_bytes(b"the same")
        (factory.inbox / "a.txt").write_text(label)
        factory.watch(Work()).step()
    rejected = factory.work / "rejected"
    labels = {file.read_text() for file in rejected.glob("*.txt") if "reason" not in file.name}
    assert labels == {"7 1", "7 2"}
    assert len([*rejected.iterdir()]) == 6


def test_a_link_to_the_model_that_leads_elsewhere_is_a_replaced_model(factory):
    old, new = factory.folder / "v1.pt", factory.folder / "v2.pt"
    old.write_text("first")
    new.write_text("by hand")
    factory.serving.unlink()
    factory.serving.symlink_to(old)
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    factory.serving.unlink()
    factory.serving.symlink_to(new)
    assert watch.run() == 0
    assert (old.read_text(), new.read_text(), watch.state.outcome) == ("first", "by hand", Outcome.NOT_PROMOTED)
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    assert factory.serving.is_symlink()
    assert new.read_text().startswith("candidate")
    assert old.read_text() == "first"
    assert factory.work.is_dir()  # beside the link
    (factory.folder / "v2-watch").mkdir()  # of another watch
    assert factory.request().work == factory.work


def test_an_inbox_is_the_folder_that_its_link_leads_to_now(factory):
    first, second = factory.folder / "first", factory.folder / "second"
    factory.inbox.rename(first)
    second.mkdir()
    factory.inbox.symlink_to(first)
    factory.deliver(1)
    watch = factory.watch(Work())
    (pair,) = watch.inbox.complete(factory.now)
    assert pair.image.parent == pair.label.parent == first.resolve()  # also if the link changes before they are moved
    watch.step()
    factory.inbox.unlink()
    factory.inbox.symlink_to(second)
    factory.deliver(3)
    assert watch.run() == 0
    assert [*second.iterdir()] == []
    assert len(factory.attempts()) == 1


def test_weights_of_a_training_that_is_over_do_not_fill_the_disk(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.REPORTING)
    weights = watch.attempt / "run" / "weights"
    weights.mkdir(parents=True)
    (weights.parent / "results.csv").touch()
    assert watch.run() == 0
    assert not weights.exists()
    assert (weights.parent / "results.csv").exists()
    assert (watch.attempt / "candidate.pt").exists()


def test_weights_of_a_training_that_failed_stay(factory):
    factory.deliver(4)
    watch = factory.watch(work := Work())
    go_to(watch, Phase.TRAINING)
    work.statuses = [1] * 6
    last = watch.attempt / "run" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert watch.run() == 1
    assert watch.state.outcome is Outcome.FAILED
    assert last.exists()  # there is no other copy of days of work


def test_weights_of_old_attempts_make_room_for_a_training(factory, monkeypatch, capsys):
    for _ in range(12):
        factory.deliver(4)
        factory.watch(Work()).run()
    assert len([*factory.work.rglob("*.pt")]) == 24

    def usage(path):  # two attempts too many
        return shutil._ntuple_diskusage(1 << 40, 0, 200 << 20 if len([*factory.work.rglob("*.pt")]) <= 20 else 0)

    factory.deliver(4)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert factory.watch(Work()).run() == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 0))
    factory.deliver(4)
    assert factory.watch(Work()).run() == 1  # the last ten stay
    kept = [attempt.name[:4] for attempt in factory.attempts() if [*attempt.glob("*.pt")]]
    assert kept == [f"{number:04d}" for number in range(4, 14)]
    assert all((attempt / "report.json").exists() for attempt in factory.attempts())
    assert capsys.readouterr().out.count("were deleted, because the disk is almost full") == 3


def test_weights_that_serve_or_are_of_others_make_no_room(factory, monkeypatch):
    for _ in range(12):
        factory.deliver(4)
        factory.watch(Work()).run()
    first, second, *_ = factory.attempts()
    (first / "run" / "weights").mkdir(parents=True)
    (first / "run" / "weights" / "best.pt").touch()  # of a training that failed
    elsewhere = factory.folder / "archive"
    elsewhere.mkdir()
    (factory.work / "history" / "0001-archive").symlink_to(elsewhere)
    mine = [elsewhere / "old.pt", factory.work / "history" / "00-kept", factory.work / "history" / "best-ones" / "a.pt"]
    mine[2].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    (first / "linked.pt").symlink_to(mine[0])
    factory.serving.unlink()
    factory.serving.symlink_to(second / "before.pt")  # back to an earlier one
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 0))
    factory.deliver(4)
    assert factory.watch(Work()).run() == 1
    assert [file.name for file in first.rglob("*.pt")] == ["linked.pt"]
    assert [file.name for file in second.rglob("*.pt")] == ["before.pt"]
    assert factory.serving.exists()
    assert all(file.exists() for file in mine)


def test_names_that_differ_only_in_case_are_two_classes_in_every_image(factory):
    (factory.inbox / "classes.txt").write_text("Crack\ncrack\nDENT\n")
    for label in ("0 .5 .5 .1 .1", "0 .5 .5 .1 .1\n1 .5 .5 .1 .1", "0 .5 .5 .1 .1", "2 .5 .5 .1 .1"):
        factory.deliver(1, label)
    watch = factory.watch(Work())
    assert watch.run() == 0
    assert watch.collection.names == ["missing", "crack", "Crack", "DENT"]
    counts = watch.collection.objects_by_class(watch.collection.entries.values())
    assert counts == {"crack": 1, "Crack": 3, "DENT": 1}


def test_label_files_with_upper_case_endings_belong_to_their_images(factory):
    factory.deliver(4)
    for label in factory.inbox.glob("*.txt"):
        label.rename(label.with_suffix(".TXT"))
    assert factory.watch(Work()).run() == 0
    assert [*factory.inbox.iterdir()] == []


def test_the_list_of_names_is_no_label(factory):
    (factory.inbox / "classes.txt").write_text("missing\n")
    factory.deliver()
    shutil.copy(factory.inbox / "0.png", factory.inbox / "classes.png")
    assert factory.watch(Work()).run() == 0
    assert {file.name for file in factory.inbox.iterdir()} == {"classes.txt", "classes.png"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("classes.txt", ""), ("classes.txt", " \n"), ("data.yaml", 'names: !!timestamp "x"'), ("data.yaml", '!!int ""')],
)
def test_a_list_of_names_without_names_keeps_images_where_they_are(name, text, factory):
    (factory.inbox / name).write_text(text)
    factory.deliver()
    inbox = Inbox(factory.inbox, {0: "missing"}, 0)
    assert inbox.complete(factory.now) == []
    assert "cannot be read, so its images stay there" in inbox.problems[0]


def test_a_list_of_names_that_is_written_with_every_image_is_read(factory):
    names, inbox = factory.inbox / "classes.txt", Inbox(factory.inbox, {0: "missing"}, 10)
    factory.deliver()
    for file in factory.inbox.iterdir():
        os.utime(file, (factory.now - 100, factory.now - 100))
    found = []
    for second in range(0, 60, 5):
        names.write_text("scratch\n" if second < 30 else "dent\n")  # changed once
        os.utime(names, (factory.now + second, factory.now + second))
        found.append([pair.names[0] for pair in inbox.complete(factory.now + second)])
    assert found == [[], [], *[["scratch"]] * 4, [], [], *[["dent"]] * 4]


def test_a_list_of_names_that_is_being_written_is_not_read(factory, monkeypatch):
    names, inbox = factory.inbox / "classes.txt", Inbox(factory.inbox, {0: "missing"}, 10)
    factory.deliver()
    for file in factory.inbox.iterdir():
        os.utime(file, (factory.now - 100, factory.now - 100))
    for second in (0, 10):
        names.write_text("scratch\n")
        os.utime(names, (factory.now + second, factory.now + second))
        found = inbox.complete(factory.now + second)
    assert [pair.names for pair in found] == [{0: "scratch"}]
    stock = Path.read_bytes

    def read_bytes(path):
        content = stock(path)
        if path.name == names.name:
            names.write_text("scr")  # the writer begins a moment later
            os.utime(names, (factory.now + 15, factory.now + 15))
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert [pair.names for pair in inbox.complete(factory.now + 15)] == [{0: "scratch"}]
    assert inbox.complete(factory.now + 20) == []


def test_a_training_whose_gpu_is_away_after_a_restart_is_tried_again(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    (watch.attempt / "run" / "weights").mkdir(parents=True)
    (watch.attempt / "run" / "weights" / "last.pt").touch()
    work = Work()
    work.statuses = [2, 2]
    assert factory.watch(work).run() == 0
    assert work.started == ["training"] * 3 + ["judging", "reporting"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_training_whose_checkpoint_is_damaged_begins_again(name, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    found = []

    def train(words):
        found.append([file.name for file in run.rglob("*.pt")])
        return 1

    monkeypatch.setattr("yolov12.cli.main", train)
    attempt = {"training": [], "data": "line.yaml"}
    for content in ({"epoch": 0, "optimizer": {}}, None):
        torch.save(content, run / "weights" / name)
        if content is None:
            os.truncate(run / "weights" / name, 100)
        assert child._train(tmp_path, attempt) == 1
    assert found == [[name], []]
    assert "the training begins again" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=["disk", "memory"])
def test_a_checkpoint_that_cannot_be_read_now_stays(error, tmp_path, monkeypatch):
    last = tmp_path / "run" / "weights" / "last.pt"
    last.parent.mkdir(parents=True)
    torch.save({"epoch": 3, "optimizer": {}}, last)

    def load(file, refused):
        raise error

    monkeypatch.setattr("yolov12.models.torch_file.load", load)
    monkeypatch.setattr("yolov12.cli.main", lambda words: 1)
    with pytest.raises(UnreadableWeightsError):
        child._train(tmp_path, {"training": [], "data": "line.yaml"})
    assert last.exists()


def test_a_candidate_that_is_no_longer_the_one_that_was_judged_is_not_promoted(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.JUDGING)
    candidate = watch.attempt / "candidate.pt"
    verdict = {"promote": True, "reasons": [], "classes": [], "candidate": moves.digest(candidate)}
    (watch.attempt / "verdict.json").write_text(json.dumps(verdict))
    candidate.write_text("half of a file")
    states.save(factory.work / "state.json", State(**{**vars(watch.state), "phase": Phase.PROMOTING}))
    work = Work()
    assert factory.watch(work).run() == 0
    assert work.started == ["training", "judging", "reporting"]
    assert factory.serving.read_text() == f"candidate of {watch.attempt.name}"


def test_an_empty_serving_model_is_waited_for(factory, capsys):
    factory.deliver(4)
    factory.serving.write_bytes(b"")
    watch = factory.watch(work := Work())
    for _ in range(5):
        watch.step()
    assert watch.run() == 1
    assert work.started == []
    assert capsys.readouterr().out.count("the serving model is empty") == 1
    factory.serving.write_text("first")
    assert watch.run() == 0


def test_a_jpeg_with_other_data_after_its_image_is_not_encoded_anew(factory):
    from ultralytics.data.utils import check_image as check_of_ultralytics

    noise = np.random.default_rng(0).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    for name, data in (("plain", encoded(noise, "JPEG")), ("trailer", encoded(255 - noise, "JPEG") + b"camera 7")):
        (factory.inbox / f"{name}.jpg").write_bytes(data)
        (factory.inbox / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1")
        os.link(factory.inbox / f"{name}.jpg", factory.folder / f"{name}.backup")
    assert factory.watch(Work()).run() == 0
    images = {file.name.partition("-")[2]: file for file in (factory.work / "dataset" / "images").rglob("*.jpg")}
    for name, ending in (("plain", b""), ("trailer", b"\xff\xd9")):
        original = (factory.folder / f"{name}.backup").read_bytes()
        check_of_ultralytics(str(images[f"{name}.jpg"]))
        assert images[f"{name}.jpg"].read_bytes() == original + ending
        assert original.endswith(b"camera 7") == bool(ending)


def test_an_image_is_taken_if_there_is_no_memory_to_add_its_end(factory, monkeypatch):
    def end_jpeg(path):
        raise MemoryError

    monkeypatch.setattr("yolov12.watch.collection.end_jpeg", end_jpeg)
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    assert len(factory.attempts()) == 1


def encoded(values, kind, **options):
    data = io.BytesIO()
    Image.fromarray(values).save(data, kind, **options)
    return data.getvalue()


def test_an_image_that_opencv_cannot_read_is_set_aside_as_it_would_end_every_training():
    noise = np.random.default_rng(0).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    for options in ({}, {"compression": "tiff_lzw"}):
        check_image(encoded(noise, "TIFF", **options))
    check_image(encoded(noise[..., 0].astype(np.uint16) * 256, "TIFF"))
    check_image(encoded(noise, "BMP"))
    for values in (noise[..., 0].astype(np.float32), noise[..., 0].astype(np.int32)):
        with pytest.raises(UnusableError, match="OpenCV cannot decode this kind of TIFF"):
            check_image(encoded(values, "TIFF"))


def test_a_file_with_boxes_and_polygons_has_boxes_only_as_a_training_would_leave_it_out(tmp_path):
    from ultralytics.data.utils import verify_image_label

    names, text = {0: "missing", 1: "bridge"}, b"1 0.5 0.5 0.25 0.125\n0 0.25 0.25 0.75 0.25 0.75 0.5\n"
    boxes = read_label(text, names, "detect")
    assert [box.values for box in boxes] == [(0.5, 0.5, 0.25, 0.125), (0.5, 0.375, 0.5, 0.25)]
    assert len(read_label(text.splitlines()[1], names, "detect")[0].values) == 6
    image, label = tmp_path / "0.png", tmp_path / "0.txt"
    Image.new("RGB", (16, 16)).save(image)
    counts = []
    for content in (text.decode(), "".join(f"0 {' '.join(map(str, box.values))}\n" for box in boxes)):
        label.write_text(content)
        found = verify_image_label((str(image), str(label), "", False, 2, 0, 0, False))[1]
        counts.append(None if found is None else len(found))
    assert counts == [None, 2]
    with pytest.raises(UnusableError, match="without width or height"):
        read_label(b"0 0.1 0.1 0.2 0.1 0.3 0.1", names, "detect")


def test_files_without_content_and_numbers_of_attempts_are_told(tmp_path):
    assert not damage.has_content(tmp_path / "nothing")
    assert damage.last_number(tmp_path / "history") == 0
    for name in ("0009-x", "0010-y", "notes-z"):
        (tmp_path / "history" / name).mkdir(parents=True)
    assert damage.last_number(tmp_path / "history") == 10


def test_two_files_are_the_same_only_if_their_content_is(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert not moves.same(one, one)
    for content, is_same in (("0 1", True), ("1 1", False), ("0 1 ", False), ("0 1", True)):
        one.write_text("0 1")
        other.write_text(content)
        for file in (one, other):  # a clock with coarse steps
            os.utime(file, (1e9, 1e9))
        assert moves.same(one, other) is is_same
