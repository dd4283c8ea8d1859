"""Rules of the inbox: what is complete, what is set aside, and where everything goes."""

import io
import os
import re

import pytest
import yaml
from PIL import Image

from yolov12.errors import DataError
from yolov12.watch.collection import Collection
from yolov12.watch.inbox import Inbox
from yolov12.watch.samples import UnusableError, check_image, read_label

NOW = 2_000_000_000.0
NAMES = {0: "missing", 1: "bridge"}


def png(number=0, size=(16, 16)):
    data = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(data, "png")
    return data.getvalue()


def put(path, content, age=1000.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (NOW - age, NOW - age))


def put_pair(folder, name, age=1000.0, label="0 0.5 0.5 0.1 0.1"):
    put(folder / "images" / f"{name}.png" if (folder / "images").exists() else folder / f"{name}.png", png(), age)
    put(folder / "labels" / f"{name}.txt" if (folder / "images").exists() else folder / f"{name}.txt", label, age)


def names_of(pairs):
    return [pair.image.stem for pair in pairs]


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def test_only_complete_pairs_are_taken(inbox):
    put_pair(inbox, "a")
    put(inbox / "image-alone.png", png())
    put(inbox / "label-alone.txt", "")
    put(inbox / ".hidden.png", png())
    put(inbox / ".hidden.txt", "")
    put(inbox / "notes.doc", "")
    put_pair(inbox, "two")
    put(inbox / "two.jpg", png())
    reader = Inbox(inbox, NAMES, 10)
    assert names_of(reader.complete(NOW)) == ["a"]
    assert "two images" in reader.problems[0]
    assert {file.stem for file in reader.alone()} == {"image-alone"}


def test_files_that_change_are_waited_for_also_if_their_clock_is_wrong(inbox):
    put_pair(inbox, "new", age=4)
    put_pair(inbox, "ahead", age=-5000)
    put(inbox / "half.png", png(), age=100)
    put(inbox / "half.txt", "", age=3)
    reader = Inbox(inbox, NAMES, 10)
    assert reader.complete(NOW) == []
    assert reader.waiting == 3
    assert names_of(reader.complete(NOW + 7)) == ["half", "new"]
    put(inbox / "ahead.png", png(1), age=-5000)
    assert "ahead" not in names_of(reader.complete(NOW + 11))
    assert "ahead" in names_of(reader.complete(NOW + 21))


def test_files_are_taken_after_the_clock_was_set_back(inbox):
    put_pair(inbox, "a", age=2)
    reader = Inbox(inbox, NAMES, 10)
    assert reader.complete(NOW) == []
    assert reader.complete(NOW - 86400) == []
    assert names_of(reader.complete(NOW - 86400 + 11)) == ["a"]


def test_only_some_of_many_pairs_are_looked_at(inbox):
    for name in "abcd":
        put_pair(inbox, name)
    put_pair(inbox, "d", age=-5000)
    reader = Inbox(inbox, NAMES, 10)
    assert reader.complete(NOW) != []
    assert names_of(reader.complete(NOW + 11, 2)) == ["a", "b"]
    assert names_of(reader.complete(NOW + 11)) == ["a", "b", "c", "d"]  # `d` was seen at first


def test_links_are_not_followed(inbox, tmp_path):
    put(tmp_path / "secret.png", png())
    (inbox / "link.png").symlink_to(tmp_path / "secret.png")
    put(inbox / "link.txt", "")
    put_pair(tmp_path / "elsewhere", "x")
    for name in ("images", "labels"):
        (inbox / name).symlink_to(tmp_path / "elsewhere")
    assert Inbox(inbox, NAMES, 0).complete(NOW) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, NAMES),
        ({"classes.txt": "crack\n\nscratch \n"}, {0: "crack", 2: "scratch"}),
        ({"data.yaml": "names: [crack]"}, {0: "crack"}),
        ({"data.yaml": "names: {3: crack}", "labels/classes.txt": "bent"}, {0: "bent"}),
    ],
)
def test_ids_have_the_names_of_the_inbox_if_it_has_any(inbox, files, expected):
    (inbox / "images").mkdir()
    put_pair(inbox, "a")
    for name, text in files.items():
        put(inbox / name, text)
    (pair,) = Inbox(inbox, NAMES, 10).complete(NOW)
    assert pair.names == expected


def test_a_list_of_names_that_changes_or_is_damaged_keeps_images_where_they_are(inbox):
    put_pair(inbox, "a")
    put(inbox / "classes.txt", "crack", age=2)
    reader = Inbox(inbox, NAMES, 10)
    assert (reader.complete(NOW), reader.waiting, reader.problems) == ([], 1, [])
    (inbox / "classes.txt").unlink()
    for text in ("names: 7", "names: 2029-99-99", "[" * 1500):
        put(inbox / "data.yaml", text)
        assert (reader.complete(NOW), reader.waiting) == ([], 0)
        assert "cannot be read" in reader.problems[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be decoded"),
        (png()[:-20], "cannot be decoded"),
        (b"GIF89a" + png(), "cannot be decoded"),
        (b"no image, but text\n", "cannot be decoded: it has no known image format"),
        (png(size=(16, 9)), "16 x 9 pixels"),
    ],
)
@pytest.mark.parametrize("stock", [True, False])
def test_images_that_cannot_be_used_have_a_reason(monkeypatch, data, reason, stock):
    from ultralytics.utils import patches

    monkeypatch.setattr(Image, "open", patches._image_open if stock else patches.image_open)
    check_image(png())
    with pytest.raises(UnusableError, match=reason) as unusable:
        check_image(data)
    assert not re.search(r"<.*>| object |0x", str(unusable.value))  # a Python object means nothing to its reader


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0 0.5 0.5 0.1 0.1 0.1", "6 columns"),
        ("2 0.5 0.5 0.1 0.1", "class id 2, which has no name"),
        ("-1 0.5 0.5 0.1 0.1", "class id -1"),
        ("0.5 0.5 0.5 0.1 0.1", r"class id 0\.5"),
        ("nan 0.5 0.5 0.1 0.1", "class id nan"),
        ("0 0.5 0.5 0.1 1.1", "outside of 0 to 1"),
        ("0 nan 0.5 0.1 0.1", "outside of 0 to 1"),
        ("0 inf 0.5 0.1 0.1", "outside of 0 to 1"),
        ("0 0.5 0.5 0 0.1", "without width"),
        ("0 a 0.5 0.1 0.1", "not a number"),
        ("\ud800", "not text"),
    ],
)
def test_labels_that_cannot_be_used_have_a_reason(label, reason):
    data = b"1 0.5 0.5 0.1 0.1\n" + label.encode("utf-8", "surrogatepass")
    with pytest.raises(UnusableError, match=reason):
        read_label(data, NAMES, "detect")


def test_labels_of_each_task_are_read():
    assert read_label(b"", NAMES, "detect") == ()
    assert [box.name for box in read_label(b"1 0.5 0.5 0.1 0.1\n\n0 0 0 1 0 1 1\n", NAMES, "detect")] == [
        "bridge",
        "missing",
    ]
    read_label(b"0 0 0 1 0 1 1\n", NAMES, "segment")
    read_label(b"0 0 0 1 0 1 1 0 1\n", NAMES, "obb")
    for task in ("segment", "obb"):
        with pytest.raises(UnusableError, match="columns"):
            read_label(b"1 0.5 0.5 0.1 0.1", NAMES, task)
    with pytest.raises(UnusableError, match="not a usable name"):
        read_label(b"0 0.5 0.5 0.1 0.1", {0: "a\x1b[2J"}, "detect")


def accept(collection, inbox, number, name, names=NAMES):
    put(inbox / f"{number}.png", png(number))
    put(inbox / f"{number}.txt", f"{[*names.values()].index(name)} 0.5 0.5 0.1 0.1")
    (pair,) = Inbox(inbox, names, 0).complete(NOW)
    boxes = read_label(pair.label.read_bytes(), pair.names, "detect")
    return collection.accept(pair, f"{number * 2654435761 % 2**32:08x}" * 8, boxes)


def test_new_names_get_the_next_ids_and_no_class_changes_its_id(inbox, tmp_path):
    (tmp_path / "work").mkdir()
    collection = Collection(tmp_path / "work", ["missing", "bridge"], 0.2)
    accept(collection, inbox, 1, "crack", {0: "crack", 1: "Bridge"})
    accept(collection, inbox, 2, "Bridge", {0: "crack", 1: "Bridge"})
    again = Collection(tmp_path / "work", ["scratch", "missing"], 0.2)
    assert again.names == ["missing", "bridge", "crack", "scratch"]
    assert yaml.safe_load(again.data.read_text())["names"] == dict(enumerate(again.names))
    assert again.objects_by_class(again.entries.values()) == {"bridge": 1, "crack": 1}
    again.data.write_text("names: [")
    with pytest.raises(DataError, match="Restore it"):
        Collection(tmp_path / "work", ["missing"], 0.2)


def test_the_split_depends_on_the_content_and_serves_every_class(inbox, tmp_path):
    splits = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        collection = Collection(tmp_path / folder, [*NAMES.values()], 0.2)
        found = [accept(collection, inbox, number, NAMES[number > 1]) for number in range(60)]
        splits.append(found)
        assert found[:4] == ["train", "val", "train", "val"]  # two images of each class: one in each split
        assert 4 < found.count("val") < 20
    assert splits[0] == splits[1]
    assert [*inbox.iterdir()] == []
