"""Odd files in the inbox: each image is taken, waits, or is set aside with a reason, and a training can read it."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.watch.factory import Work, put
from yolov12.watch import loop
from yolov12.watch.inbox import Inbox
from yolov12.watch.samples import UnusableError, check_image, read_label


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
