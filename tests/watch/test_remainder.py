"""The line of the log on files that stay in the inbox: images without labels, labels without images, other files."""

import os
import time
import unicodedata

import pytest

from tests.watch.factory import Factory, Work
from yolov12.watch import remainder
from yolov12.watch.inbox import Inbox

HOUR, DAY = 3600.0, 86400.0


@pytest.fixture
def factory(tmp_path):
    """The clock begins now, as the time when a file came into the inbox is one that nobody can set."""
    factory = Factory(tmp_path)
    factory.now = time.time()
    return factory


@pytest.fixture
def lines(capsys):
    def read():
        return [line.partition("inbox: ")[2] for line in capsys.readouterr().out.splitlines() if "  inbox: " in line]

    return read


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        os.utime(folder / name, (1e9, 1e9))


def after(factory, watch, seconds):
    for _ in range(int(seconds // HOUR)):
        factory.now += HOUR
        watch.step()


def test_what_waits_or_is_not_read_is_said_in_one_line(factory, lines):
    put(factory.inbox, "a.jpg", "b.png", "c.txt", "x.heic", "x.xml", "classes.txt", "data.yaml", ".hidden.jpg")
    put(factory.inbox, "train/images/1.jpg", "train/labels/1.txt")
    (factory.inbox / "link.jpg").symlink_to("/nowhere")
    factory.deliver(2)
    factory.now += 3 * DAY + 60
    watch = factory.watch(Work())
    watch.step()
    assert lines() == [
        "2 images have had no label file for up to 3 days (first: a.jpg), 1 label file has no image (first: c.txt), "
        "3 files and 1 folder are not read (first: link.jpg)"
    ]
    after(factory, watch, 3 * DAY)  # nothing has changed but the time
    assert lines() == []


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["a.jpg"], "1 image has had no label file for up to 2 hours (first: a.jpg)"),
        (["b.txt", "c.TXT"], "2 label files have no image (first: b.txt)"),
        (["x.heic"], "1 file is not read (first: x.heic)"),
        (["train/a.jpg", "valid/a.jpg"], "2 folders are not read (first: train)"),
        (["images/a.jpg"], "images/ is not read without a folder labels/ beside it"),
        (["labels/a.txt"], "labels/ is not read without a folder images/ beside it"),
        (["images/a.jpg", "labels/a.txt"], None),
        (["images/a.jpg", "labels/b.txt"], "(first: images/a.jpg), 1 label file has no image (first: labels/b.txt)"),
        (["images/a.txt", "labels/a.jpg"], "2 files are not read (first: images/a.txt)"),
        (["images/x/a.jpg", "labels/x/a.txt"], "2 folders are not read (first: images/x)"),
        (["\x1b[2J.heic"], "1 file is not read (first: \\x1b[2J.heic)"),
        ([], None),
    ],
)
def test_each_kind_of_file_has_its_words(names, line, factory):
    put(factory.inbox, *names)
    found = str(remainder.look(factory.inbox, factory.now + 2.5 * HOUR, 10))
    assert found.endswith(line) and found.startswith("inbox: ") if line else found == ""


def test_young_files_do_not_count_whatever_the_time_of_their_content(factory):
    put(factory.inbox, "a.jpg", "b.txt")
    (factory.inbox / "c.jpg.part").touch()  # is renamed when it is complete
    os.utime(factory.inbox / "c.jpg.part", (factory.now, factory.now))
    assert str(remainder.look(factory.inbox, factory.now + 5, 10)) == ""
    assert "1 image has had no label file for up to 11 minutes" in str(
        remainder.look(factory.inbox, factory.now + 700, 10)
    )


def test_a_busy_inbox_has_one_line_a_day(factory, lines):
    watch = factory.watch(Work())
    for number in range(3 * 24):
        put(factory.inbox, f"{number:02d}.jpg")
        after(factory, watch, HOUR)
    said = lines()
    assert len(said) == 3
    assert "25 images have" in said[1]


def test_the_inbox_is_looked_through_once_an_hour(factory, monkeypatch):
    looks = []
    stock = remainder.look
    monkeypatch.setattr(remainder, "look", lambda *args: looks.append(args) or stock(*args))
    put(factory.inbox, "a.jpg")
    watch = factory.watch(Work())
    for _ in range(1000):
        watch.step()
        factory.now += 10
    assert len(looks) == 3
    factory.now -= DAY  # the clock is set back
    watch.step()
    assert len(looks) == 4


def test_what_was_gone_is_said_again(factory, lines):
    watch = factory.watch(Work())
    put(factory.inbox, "x.heic")
    after(factory, watch, HOUR)
    (factory.inbox / "x.heic").unlink()
    after(factory, watch, 2 * DAY)
    put(factory.inbox, "x.heic")
    after(factory, watch, 2 * DAY)
    assert lines() == ["1 file is not read (first: x.heic)"] * 2


def test_once_says_it_before_it_ends_and_it_is_no_error(factory, lines):
    put(factory.inbox, "x.heic")
    factory.deliver(4)
    work = Work()
    start = work.start
    work.start = lambda *args: put(factory.inbox, "y.heic") or start(*args)
    assert factory.watch(work).run() == 0
    assert lines() == ["1 file is not read (first: x.heic)", "2 files are not read (first: x.heic)"]
    assert factory.watch(Work()).run() == 0
    assert len(lines()) == 1


def test_an_inbox_that_is_away_has_no_line(factory, lines):
    watch = factory.watch(Work())
    factory.inbox.rmdir()
    assert watch.run() == 1
    assert lines() == []


def test_names_whose_letters_macos_has_decomposed_are_the_same(factory):
    composed, decomposed = (unicodedata.normalize(form, "Prüfstück") for form in ("NFC", "NFD"))
    put(factory.inbox, f"{composed}-1.jpg", f"{decomposed}-1.txt", f"{decomposed}-2.jpg", f"{composed}-2.txt")
    for form in (composed, decomposed):  # two images: each has its own
        put(factory.inbox, f"{form}-3.jpg", f"{form}-3.txt")
    reader = Inbox(factory.inbox, {0: "missing"}, 0)
    pairs = reader.complete(factory.now)
    assert len(pairs) == 4
    assert [pair.image.stem for pair in pairs if pair.image.stem != pair.label.stem] == [
        f"{decomposed}-2",
        f"{composed}-1",
    ]
    assert ([*reader.alone()], reader.problems) == ([], [])


def test_the_first_of_label_files_that_belong_to_two_images_is_named(factory):
    put(factory.inbox, "b.jpg", "b.png", "b.txt", "c.jpg", "c.png", "c.txt")
    reader = Inbox(factory.inbox, {0: "missing"}, 0)
    assert reader.complete(factory.now) == []
    assert reader.problems == ["2 label files belong to two images each (first: b.txt): rename the images"]
