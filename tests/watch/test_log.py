"""Logs of the processes of a watch: progress bars do not fill the disk."""

import io
import json
from contextlib import redirect_stdout

from ultralytics.utils import TQDM

from yolov12.watch import child
from yolov12.watch.log import SparseBars


def draw(frames, after_each=lambda: None):
    bar = TQDM(total=frames, desc="epoch 1", mininterval=0)
    for _ in range(frames):
        after_each()
        bar.update()
    bar.close()


def test_a_progress_bar_is_written_once_a_minute_and_at_its_end():
    stream, now = io.StringIO(), [0.0]

    def wait():
        now[0] += 25

    with redirect_stdout(SparseBars(stream, lambda: now[0])):
        draw(8, wait)
        draw(2, wait)
        print("done")
    lines = stream.getvalue().splitlines()
    assert [next(word for word in line.split() if "/" in word) for line in lines[:-1]] == ["3/8", "6/8", "8/8", "2/2"]
    assert lines[-1] == "done"
    assert "\r" not in stream.getvalue()


def test_bars_that_run_at_once_do_not_mix():
    stream = io.StringIO()
    bars = SparseBars(stream)
    bars.progress(1, "\r\033[Kone")
    bars.progress(2, "\r\033[Ktwo")
    for bar in (1, 2, 3):
        bars.progress(bar, "")
        bars.write("\n")
    assert stream.getvalue() == "one\ntwo\n\n"


def test_the_log_of_an_attempt_has_the_last_frame_of_each_bar(tmp_path, monkeypatch, capsys):
    (tmp_path / "attempt.json").write_text(json.dumps({}))
    monkeypatch.setitem(child._TASKS, "training", lambda folder, attempt: draw(500) or 0)
    assert child.run("training", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("500/500") == 1
    assert len(out) < 200
