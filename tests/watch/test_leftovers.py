"""A label file without an image does not become the label of a later image of the same name."""

import os
import shutil

import pytest

from tests.watch.factory import Work
from yolov12.watch.inbox import Inbox

HOUR = 3600.0
LABEL = "0 0.5 0.5 0.1 0.1"


class Line:
    """An inbox that is looked at each minute."""

    def __init__(self, factory):
        self.factory, self.folder = factory, factory.inbox
        self.start()

    def start(self):
        self.reader = Inbox(self.folder, {0: "missing"}, 10)

    def write(self, name, content, age=0.0):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        os.utime(path, (self.factory.now - age, self.factory.now - age))

    def after(self, seconds):
        """Return the names of the images that are complete after some time."""
        for _ in range(int(seconds // 60)):
            self.factory.now += 60
            pairs = self.reader.complete(self.factory.now)
        return [pair.image.name for pair in pairs]


@pytest.fixture
def line(factory):
    return Line(factory)


def test_a_label_file_that_was_alone_for_long_waits_for_somebody_to_look_at_it(line):
    line.write("0001.txt", LABEL)
    assert line.after(24 * HOUR) == []
    line.write("0001.png", "image of the next day")
    line.write("0002.png", "image")
    line.write("0002.txt", LABEL)
    for _ in range(3):
        assert line.after(HOUR) == ["0002.png"]
        (problem,) = line.reader.problems
        assert "(first: 0001.txt)" in problem
        assert "save them again" in problem
        assert line.reader.waiting == 0  # `--once` ends
    line.write("0001.txt", "0 0.2 0.2 0.1 0.1")
    assert line.after(60) == ["0001.png", "0002.png"]
    assert line.reader.problems == []


def test_a_leftover_that_is_deleted_is_forgotten(line):
    line.write("labels/0001.txt", LABEL)
    line.write("images/0000.png", "image")
    assert line.after(2 * HOUR) == []
    line.write("images/0001.png", "image")
    assert line.after(60) == []
    assert "0001.txt" in line.reader.problems[0]
    (line.folder / "labels" / "0001.txt").unlink()
    assert (line.after(60), line.reader.problems) == ([], [])
    line.write("labels/0001.txt", LABEL)
    assert line.after(60) == ["0001.png"]


@pytest.mark.parametrize("alone_s", [60.0, 0.9 * HOUR])
def test_a_label_file_that_comes_before_its_image_is_used(line, alone_s):
    line.write("a.txt", LABEL, age=1000 * HOUR)
    line.after(alone_s)
    line.write("a.png", "image", age=1000 * HOUR)
    assert line.after(60) == ["a.png"]


def test_a_label_file_that_is_saved_again_shortly_before_its_image_is_used(line):
    line.write("a.txt", LABEL)
    line.after(5 * HOUR)
    line.write("a.txt", LABEL + "\n")
    line.after(660)  # the new version is read
    line.after(600)
    line.write("a.png", "image")
    assert line.after(60) == ["a.png"]


def test_times_of_files_say_nothing_so_an_old_data_set_is_taken(line):
    line.write("a.txt", LABEL, age=1000 * HOUR)
    line.write("a.png", "image", age=10 * HOUR)
    assert line.after(60) == ["a.png"]


def test_after_a_restart_the_hour_begins_anew(line):
    line.write("a.txt", LABEL)
    line.after(5 * HOUR)
    line.start()
    line.after(0.5 * HOUR)
    line.write("a.png", "image")
    assert line.after(60) == ["a.png"]


def test_time_in_which_nobody_looked_does_not_count(line):
    line.write("a.txt", LABEL)
    line.after(60)
    line.factory.now += 8 * HOUR  # the machine slept
    line.write("a.png", "image")
    assert line.after(60) == ["a.png"]


def test_a_clock_that_is_set_back_does_not_keep_a_label_file(line):
    line.write("a.txt", LABEL)
    line.after(120)
    line.factory.now -= 5 * HOUR
    line.after(0.5 * HOUR)
    line.write("a.png", "image")
    assert line.after(120) == ["a.png"]


def test_the_counter_of_a_camera_begins_anew_and_no_image_gets_the_boxes_of_yesterday(factory, capsys):
    factory.deliver(2)
    watch = factory.watch(Work(), "min_images=20")
    first, second = ((factory.inbox / f"{number}.png").read_bytes() for number in (0, 1))
    shutil.move(factory.inbox / "1.png", factory.folder)
    (factory.inbox / "1.txt").unlink()
    watch.step()
    (factory.inbox / "0.txt").write_text(LABEL)  # the annotator saves it again
    for _ in range(25):
        watch.step()
        factory.now += HOUR / 4
    (factory.inbox / "0.png").write_bytes(second)
    watch.step()
    assert (factory.inbox / "0.png").read_bytes() == second
    assert "may belong to earlier images" in capsys.readouterr().out
    assert watch.run() == 1  # a file stays in the inbox with a reason
    assert {path.read_bytes() for path in factory.work.rglob("*.png")} == {first}
    (factory.inbox / "0.txt").write_text("1 0.5 0.5 0.1 0.1")
    assert watch.run() == 0
    assert {path.read_bytes() for path in factory.work.rglob("*.png")} == {first, second}
