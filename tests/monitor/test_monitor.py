"""`yolov12 monitor`: what it shows, that it follows a growing journal, and that the run does not notice it."""

import functools
import io
import os
import subprocess
import sys
import threading
import time

import pytest
import rich.console

from tests.monitor.run_files import HEADER, NEWER, end, line, rows, write
from yolov12 import cli, monitor
from yolov12.monitor.chart import bar, columns, rows_of_bars
from yolov12.monitor.follow import Follower, Tail
from yolov12.monitor.runs import State
from yolov12.monitor.view import render


def steps(tail):
    return [int(row["step"]) for row in tail.rows]


PICTURE = """\
train-3 · running · epoch 2, step 79
so far: The run survived 1 out-of-memory: batches of 64 ran in micro-batches of…
batch of 64, mostly one micro-batch · peak at most 90 % of the budget · 128 ima…
now: 300 MiB of 400 MiB ████████████████████░░░░░░░ 75 % as 4 × 16, 128 images/s
peak of each step, and budget (line), X: out of memory, survived
                          X
1000 MiB ▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃──────────────────▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃▃
         █████████████████                  ██████████████████
         █████████████████                  ██████████████████
         █████████████████████████████████████████████████████──────────────────
         █████████████████████████████████████████████████████▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆
       0 ███████████████████████████████████████████████████████████████████████
    step 1                                                                    79
images in a micro-batch
      64 █████████████████                  ██████████████████
         █████████████████▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄██████████████████
       0 █████████████████████████████████████████████████████▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆▆
what happened
     20  out of memory at 64 images, survived
     20  batch split into 2 × 32
     40  batch ran as one micro-batch
     60  other processes took 600 MiB: batch split into 4 × 16"""


@pytest.fixture
def tight():
    """The rows of a run that survives an out-of-memory, and that another process takes memory from."""
    special = {
        20: line(20, "out-of-memory at 64; shrunk 64 to 32", size=32, peak=500),
        **{step: line(step, size=32, peak=500) for step in range(21, 40)},
        40: line(40, "grew 32 to 64"),
        60: line(60, "shrunk 64 to 16", size=16, budget=400, peak=300),
        **{step: line(step, size=16, budget=400, peak=300) for step in range(61, 80)},
    }
    return rows(*(special.get(step) or line(step) for step in range(1, 80)))


def test_the_picture_of_a_run_at_80_columns(tight):
    text = render("train-3", {0: tight}, State("running"), 80, 23, unicode=True).plain
    assert [each.rstrip() for each in text.splitlines()] == PICTURE.splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 23), (40, 10), (20, 5), (200, 60), (7, 40)])
@pytest.mark.parametrize("count", [1, 3])
def test_pictures_fit_the_terminal(tight, width, height, count):
    lines = render("train-3", dict.fromkeys(range(count), tight), State("running"), width, height, unicode=True).plain
    assert len(lines.splitlines()) <= height
    assert max(map(len, lines.splitlines())) <= width


def test_several_ranks_have_a_line_each_and_the_chart_of_the_tightest(tight):
    calm = rows(*(line(step, peak=300) for step in range(1, 80)))
    text = render("train", {0: calm, 1: tight}, State("running"), 80, 23, unicode=True).plain
    assert "rank 0: 300 MiB of 1000 MiB" in text
    assert "rank 1: 300 MiB of 400 MiB" in text
    assert "budget (line), rank 1" in text
    assert "rank 1: out of memory at 64 images, survived" in text


def test_a_terminal_without_unicode_gets_ascii(tight):
    for journals in ({0: tight}, {}):
        assert render("Prüfung", journals, State("running"), 80, 23, unicode=False).plain.isascii()


def test_a_name_of_somebody_else_does_not_write_to_the_terminal():
    assert "\x1b" not in render("a\x1b[2Jb", {}, State("running"), 80, 23, unicode=True).plain
    name = os.fsdecode(b"caf\xe9")  # not UTF-8
    assert render(name, {}, State("running"), 80, 23, unicode=True).plain.encode() == b"caf\\udce9 \xc2\xb7 running"


def test_bars_and_lines():
    assert bar(0.5, 8, unicode=True) == "████░░░░"
    assert bar(0.001, 4, unicode=False) == "#..."
    assert bar(1.7, 4, unicode=True) == "████"
    assert rows_of_bars([0, 1, 2, 4], 4, 2, [4, 4, 1, 3], unicode=True) == ["── █", " ▄██"]
    assert columns([1, 2, 4], 10) == [[0], [0], [1], [1], [1], [1], [2], [2]]  # step 3 is missing
    assert columns(range(1, 101), 4) == [list(range(start, start + 25)) for start in range(0, 100, 25)]


def test_a_growing_file_is_read_once(tmp_path):
    file = tmp_path / "memory.csv"
    tail = Tail(file)
    tail.read()
    assert tail.rows == []
    file.write_text(HEADER + line(1) + line(2)[:20])  # half a line
    tail.read()
    assert steps(tail) == [1]
    with file.open("r+") as changed:
        changed.write("x" * 20)  # nobody reads the beginning again
    with file.open("a") as appended:
        appended.write(line(2)[20:] + line(3))
    tail.read()
    assert steps(tail) == [1, 2, 3]


def test_a_file_that_a_resume_cut_or_a_new_run_replaced_is_read_from_its_begin(tmp_path):
    file = tmp_path / "memory.csv"
    tail = Tail(file)
    file.write_text(HEADER + line(1) + line(2) + line(3))
    tail.read()
    file.write_text(HEADER + line(1) + line(2, "resumed") + line(3, peak=5) + line(4))  # longer than before
    tail.read()
    assert steps(tail) == [1, 2, 3, 4]
    assert tail.rows[1]["events"] == "resumed"
    file.write_text(HEADER)
    tail.read()
    assert tail.rows == []
    file.unlink()
    tail.read()
    file.write_text(HEADER + line(1))
    tail.read()
    assert steps(tail) == [1]


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    file = tmp_path / "memory.csv"
    file.write_bytes((HEADER + line(1)).encode() + b"\0\0\0\n1,2\n\xff\n" + (HEADER + line(2)).encode())
    tail = Tail(file)
    tail.read()
    assert steps(tail) == [1, 2]


def test_of_a_long_run_the_latest_steps_and_the_tightest_are_kept(tmp_path):
    file = tmp_path / "memory.csv"
    special = {777: line(777, peak=990), 1301: line(1301, "batch of 64 did not fit"), 2302: line(2302, "grew 1 to 2")}
    file.write_text(HEADER + "".join(special.get(step) or line(step) for step in range(1, 9000)))
    tail = Tail(file)
    tail.read()
    assert len(tail.rows) <= 5120
    assert steps(tail)[-1000:] == list(range(8000, 9000))
    assert special.keys() <= set(steps(tail))


def test_a_run_that_began_with_an_earlier_version_is_followed(tmp_path):
    """A resumed run continues its file, which has no columns for power and temperature."""
    old = line(1).replace("128.0,,,,,,,0,", "128.0,")
    (tmp_path / "memory.csv").write_text(HEADER.replace(NEWER, "") + old)
    follower = Follower(tmp_path)
    follower.read()
    assert "peak at most 90 %" in render("train", follower.journals(), follower.state(), 80, 23, unicode=True).plain


def test_without_a_terminal_one_picture_is_printed_and_nothing_changes(tmp_path, capsys):
    write(tmp_path, *(line(step) for step in range(1, 30)))
    write(tmp_path, *(line(step) for step in range(1, 30)), name="memory.rank1.csv")
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()}
    assert cli.main(["monitor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "rank 1: 900 MiB of 1000 MiB" in out
    assert "\x1b" not in out
    assert before == {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()}


@pytest.fixture
def terminal(monkeypatch):
    """The text that a terminal of 80 × 24 characters would get."""
    shown = io.StringIO()
    shape = {"width": 80, "height": 24, "force_terminal": True, "file": shown, "color_system": "standard"}
    monkeypatch.setattr(rich.console, "Console", functools.partial(rich.console.Console, **shape))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return shown


def test_a_live_run_is_followed_to_its_end(tmp_path, terminal):
    write(tmp_path)

    def seen(words):
        for _ in range(6000):
            if words in terminal.getvalue():
                return
            time.sleep(0.01)

    def train():
        seen("starting: no step was made yet")
        for step in range(1, 4):
            with (tmp_path / "memory.csv").open("a") as file:
                file.write(line(step)[:9])
                file.flush()
                time.sleep(0.02)  # so that half a line may be read
                file.write(line(step)[9:])
            seen(f"step {step}")
        end(tmp_path)

    training = threading.Thread(target=train)
    training.start()
    assert monitor.main([str(tmp_path), "every=0.1"]) == 0
    training.join()
    shown = terminal.getvalue()
    assert "starting: no step was made yet" in shown
    assert "running" in shown
    last = shown[shown.rindex("\x1b[?1049l") :]  # after the terminal's second screen
    assert "ended after 3 updates · epoch 1, step 3" in last
    assert "\x1b[34m" in last  # blue


def test_once_and_no_color(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert monitor.main([f"run={write(tmp_path, line(1))}", "once=True"]) == 0
    assert "\x1b[?1049h" not in terminal.getvalue()
    assert "\x1b[34m" not in terminal.getvalue()


def test_ctrl_c_ends_the_view_without_a_word(tmp_path, terminal, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor.time, "sleep", interrupt)
    assert cli.main(["monitor", str(write(tmp_path, line(1)))]) == 130
    assert capsys.readouterr().err == ""
    assert terminal.getvalue().count("\x1b[?1049h") == terminal.getvalue().count("\x1b[?1049l") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "there is no run folder missing"),
        ([".", "other"], "'other' is one run too many"),
        (["evry=2"], "unknown argument 'evry'"),
        (["every=fast"], "every=fast is not a number of seconds"),
        (["once=perhaps"], "once=perhaps is neither True nor False"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    assert cli.main(["monitor", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_and_start_need_neither_torch_nor_ultralytics(tmp_path):
    code = (
        "import sys\nfrom yolov12 import cli\n"
        f"assert cli.main(['monitor', '--help']) == cli.main(['monitor', {str(write(tmp_path, line(1)))!r}]) == 0\n"
        "assert not {'torch', 'ultralytics', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "folder of the run" in done.stdout
