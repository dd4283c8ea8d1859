"""The contents of memory.csv, memory.json, memory.png and the lines at the end of a run."""

import errno
import json
import shutil
from dataclasses import asdict, replace

import pytest

from yolov12.mas.journal.journal import Journal, Row, read_rows
from yolov12.mas.journal.picture import draw, thin

MIB = 2**20
HEADER = (
    "step,epoch,images,micro_batches,plan,image_size,max_boxes,"
    "predicted_mib,peak_mib,reserved_mib,free_mib,budget_mib,step_ms,images_per_s,"
    "data_wait_ms,decode_ms,augment_ms,period_ms,power_w,temperature_c,replayed,events"
)
NEWER = "data_wait_ms,decode_ms,augment_ms,period_ms,power_w,temperature_c,replayed,"
"""Columns that files of earlier versions do not have."""


def row(step, *events, epoch=1, micro_batches=(64, 64), peak=7000, budget=7400, step_ms=500.0):
    sizes = {"predicted": peak * 1.01, "peak": peak, "reserved": 7100, "free": 900.06, "budget": budget}
    return Row(
        step=step,
        epoch=epoch,
        images=sum(micro_batches),
        micro_batches=micro_batches,
        plan="",
        image_size="640x640",
        max_boxes=31,
        step_ms=step_ms,
        events=events,
        **{f"{name}_bytes": int(size * MIB) for name, size in sizes.items()},
    )


def write(folder, rows, *, resume=False, expected=None):
    journal = Journal(folder, resume=resume)
    for each in rows:
        journal.add(each)
    return journal.close(updates_expected=expected)


def lines(folder):
    return (folder / "memory.csv").read_text().splitlines()


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_a_step_is_a_line(tmp_path):
    write(
        tmp_path,
        [
            replace(
                row(1, "out-of-memory at 128", "shrunk 128 to 64", micro_batches=(64, 32)),
                data_wait_ms=40.0,
                decode_ms=30.0,
                augment_ms=20.0,
            ),
            replace(row(2, step_ms=None), period_ms=600.0),
        ],
    )
    assert lines(tmp_path) == [
        HEADER,
        "1,1,96,64 32,,640x640,31,7070.0,7000.0,7100.0,900.1,7400.0,500.0,192.0,40.0,30.0,20.0,,,,0,"
        "out-of-memory at 128; shrunk 128 to 64",
        "2,1,128,64 64,,640x640,31,7070.0,7000.0,7100.0,900.1,7400.0,,,,,,600.0,,,0,",
    ]


def test_rows_are_read_back_by_column(tmp_path):
    write(tmp_path, [row(1, "groups of 16, by choice")])
    (told,) = read_rows(tmp_path / "memory.csv")
    assert list(told) == HEADER.split(",")
    assert told["micro_batches"] == "64 64"
    assert told["events"] == "groups of 16, by choice"


def test_a_run_that_goes_on_can_be_read(tmp_path):
    journal = Journal(tmp_path)
    assert read_rows(tmp_path / "memory.csv") == []
    journal.add(row(1))
    assert journal.summary(updates_expected=2).updates == 1
    journal.add(row(2))
    assert journal.close(updates_expected=2).updates == 2


def test_a_new_run_starts_anew(tmp_path):
    write(tmp_path, [row(1), row(2)])
    journal = Journal(tmp_path)
    assert journal.next_step == 1
    assert lines(tmp_path) == [HEADER]
    assert not (tmp_path / "memory.json").exists()
    journal.close(updates_expected=None)


def test_resume_goes_on_where_the_file_ends(tmp_path):
    write(tmp_path, [row(1), row(2)])
    journal = Journal(tmp_path, resume=True)
    assert journal.next_step == 3
    journal.add(row(3, "grew 32 to 64", epoch=2))
    journal.add(row(4, epoch=2))
    assert journal.next_step == 5
    journal.close(updates_expected=None)
    told = read_rows(tmp_path / "memory.csv")
    assert [(each["step"], each["events"]) for each in told] == [
        ("1", ""),
        ("2", ""),
        ("3", "resumed; grew 32 to 64"),
        ("4", ""),
    ]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path, cut):
    write(tmp_path, [row(1), row(2)])
    path = tmp_path / "memory.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_rows(path)) == 1
    write(tmp_path, [row(2, epoch=2)], resume=True)
    assert [each["step"] for each in read_rows(path)] == ["1", "2"]


def test_equal_texts_of_a_long_run_are_in_memory_once(tmp_path):
    write(tmp_path, [row(step) for step in range(1, 20)])
    first, *others = read_rows(tmp_path / "memory.csv")
    assert all(each["micro_batches"] is first["micro_batches"] for each in others)


def test_power_and_temperature_are_summarised_where_they_are_known(tmp_path):
    rows = [
        replace(row(1), power_w=20.0, temperature_c=50.0),
        row(2),
        replace(row(3), power_w=30.0, temperature_c=61.5),
    ]
    summary = write(tmp_path, rows)
    assert [(each["power_w"], each["temperature_c"]) for each in read_rows(tmp_path / "memory.csv")] == [
        ("20.0", "50.0"),
        ("", ""),
        ("30.0", "61.5"),
    ]
    assert (summary.power_mean_w, summary.temperature_max_c) == (25.0, 61.5)
    assert summary.as_text().endswith("images/s; 25 W; at most 62 °C")


def test_a_file_of_an_earlier_version_keeps_its_columns(tmp_path):
    old = HEADER.replace("reserved_mib", "held_mib").replace(NEWER, "")
    (tmp_path / "memory.csv").write_text(f"{old}\n1,1,64,64,,640x640,31,1.0,2.0,3.0,4.0,5.0,6.0,7.0,grew 1 to 2\n")
    summary = write(tmp_path, [replace(row(2, epoch=2), power_w=20.0)], resume=True)
    assert lines(tmp_path)[0] == old
    first, second = read_rows(tmp_path / "memory.csv")
    assert (first["events"], second["events"], second["reserved_mib"]) == ("grew 1 to 2", "resumed", "7100.0")
    assert (summary.updates, summary.power_mean_w) == (2, None)


@pytest.mark.parametrize("left", [None, "", HEADER[:30]])
def test_resume_with_nothing_to_go_on_from(tmp_path, left):
    if left is not None:
        (tmp_path / "memory.csv").write_text(left)
    assert write(tmp_path, [row(1)], resume=True).updates == 1
    assert lines(tmp_path)[0] == HEADER
    assert read_rows(tmp_path / "memory.csv")[0]["events"] == ""


def test_summary(tmp_path):
    journal = Journal(tmp_path)
    journal.add(row(1, "out-of-memory at 128", "retried 128", "out-of-memory at 128", "shrunk 128 to 64", peak=6000))
    journal.add(row(2, peak=7000, budget=7200, step_ms=None))
    events = "grew 64 to 128", "over the limit of 7,900 MiB"
    journal.add(row(3, *events, micro_batches=(128,), peak=8000, step_ms=400.0))
    journal.lost(7)
    for percent in (90.0, None, 100.0):
        journal.busy(percent)
    summary = journal.close(updates_expected=4)
    assert asdict(summary) == {
        "updates": 3,
        "updates_expected": 4,
        "updates_repeated": 0,
        "images": 384,
        "images_lost": 7,
        "out_of_memories": 2,
        "retries": 1,
        "shrinks": 1,
        "grows": 1,
        "peak_mean_mib": 7000.0,
        "peak_sd_mib": pytest.approx(816.5, abs=0.1),  # sqrt(2/3) * 1000
        "peak_max_mib": 8000.0,
        "over_limit": 1,
        "budget_min_mib": 7200.0,
        "budget_max_mib": 7400.0,
        "prediction_error_percent": pytest.approx(1.0),
        "micro_batch_min": 64,
        "micro_batch_median": 64,
        "micro_batch_max": 128,
        "images_per_s": 288.0,  # median of 256 and 320
        "gpu_utilisation_percent": 95.0,
        "data_wait_percent": None,
        "decode_ms": None,
        "augment_ms": None,
        "power_mean_w": None,
        "temperature_max_c": None,
        "rank": None,
        "share_min": None,
        "share_max": None,
        "ranks_missing": 0,
        "ranks": (),
        "explanation": "",
    }
    assert json.loads((tmp_path / "memory.json").read_text()) == {**asdict(summary), "ranks": []}
    assert summary.as_text() == (
        "memory: 2 out-of-memories survived, 7 images lost, 3 of 4 updates\n"
        "  peak 7,000 ± 816 MiB, at most 8,000, of a budget of 7,200 to 7,400 MiB, "
        "over the limit in 1 step; predicted to 1.0 %\n"
        "  micro-batches of 64 to 128 images, median 64, shrunk 1 time, grown 1 time; 288.0 images/s; "
        "GPU busy 95 % of the time"
    )


def test_text_leaves_out_what_is_not_known(tmp_path):
    assert write(tmp_path, [row(1, "out-of-memory at 128", step_ms=None)]).as_text() == (
        "memory: 1 out-of-memory survived, 0 images lost, 1 update\n"
        "  peak 7,000 ± 0 MiB, at most 7,000, of a budget of 7,400 MiB; predicted to 1.0 %\n"
        "  micro-batches of 64 images, shrunk 0 times, grown 0 times"
    )


def test_summary_after_a_resume_is_of_the_whole_run(tmp_path):
    journal = Journal(tmp_path)
    journal.add(row(1, "out-of-memory at 128"))
    journal.lost(3)
    journal.busy(90.0)
    journal.close(updates_expected=2)
    journal = Journal(tmp_path, resume=True)
    journal.add(row(2, "out-of-memory at 128", epoch=2))
    journal.lost(4)
    journal.busy(100.0)
    summary = journal.close(updates_expected=2)
    assert (summary.updates, summary.out_of_memories, summary.images_lost) == (2, 2, 7)
    assert summary.gpu_utilisation_percent == 95.0


def test_losses_of_before_that_were_never_written_count_from_now(tmp_path):
    write(tmp_path, [row(1)])
    (tmp_path / "memory.json").unlink()
    journal = Journal(tmp_path, resume=True)
    journal.lost(4)
    assert journal.close(updates_expected=None).images_lost == 4


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_summary_does_not_keep_a_run_from_going_on(tmp_path, content):
    """A power cut may leave a file empty."""
    write(tmp_path, [row(1)])
    (tmp_path / "memory.json").write_text(content)
    write(tmp_path, [row(2, epoch=2)], resume=True)
    assert json.loads((tmp_path / "memory.json").read_text())["updates"] == 2


def test_a_summary_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    write(tmp_path, [row(1)])
    earlier = (tmp_path / "memory.json").read_text()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("yolov12.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [row(2)], resume=True)
    assert (tmp_path / "memory.json").read_text() == earlier
    assert {file.name for file in tmp_path.iterdir()} <= {"memory.csv", "memory.json", "memory.png"}


def test_updates_that_a_resume_makes_again_count_once(tmp_path):
    """A run killed in epoch 2 is resumed from the checkpoint of epoch 1, twice."""
    write(tmp_path, [row(1), row(2), row(3, epoch=2)])
    write(tmp_path, [row(4, epoch=2)], resume=True)
    summary = write(tmp_path, [row(5, epoch=2), row(6, epoch=2), row(7, epoch=3)], resume=True, expected=3)
    assert (summary.updates, summary.updates_repeated, summary.images) == (5, 2, 5 * 128)
    assert "5 of 5 updates (2 more were repeated after a resume)" in summary.as_text()


def test_a_run_without_steps(tmp_path):
    summary = write(tmp_path, [], expected=10)
    assert summary.as_text() == "memory: no step was complete, 0 images lost"
    assert json.loads((tmp_path / "memory.json").read_text())["peak_mean_mib"] is None
    assert not (tmp_path / "memory.png").exists()


def test_a_folder_that_cannot_be_written_to_is_a_plain_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Journal(tmp_path / "file")


def test_a_folder_that_disappears_is_a_plain_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder)
    journal.add(row(1))
    shutil.rmtree(folder)
    journal.add(row(2))
    with pytest.raises(FileNotFoundError):
        journal.close(updates_expected=None)


def test_rows_that_a_power_cut_took_leave_a_gap(tmp_path):
    """The checkpoint is of step 5, so step numbers continue after 5."""
    write(tmp_path, [row(1), row(2)])
    journal = Journal(tmp_path, resume=True, steps=5)
    assert journal.next_step == 6
    journal.add(row(6))
    journal.close(updates_expected=None)
    assert [(each["step"], each["events"]) for each in read_rows(tmp_path / "memory.csv")] == [
        ("1", ""),
        ("2", ""),
        ("6", "resumed after step 5"),
    ]


def told(tmp_path, rows):
    write(tmp_path, rows)
    return read_rows(tmp_path / "memory.csv")


@pytest.mark.picture
@pytest.mark.parametrize("count", [1, 2, 300])
def test_picture_is_a_png_of_1200_by_800(tmp_path, count):
    write(tmp_path, [row(step, epoch=step) for step in range(1, count + 1)])
    header = (tmp_path / "memory.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1200, 800)


def test_picture_has_three_panels_over_the_same_steps(tmp_path):
    figure = draw(told(tmp_path, [row(step) for step in range(1, 101)]))
    memory, micro_batches, speed = figure.axes
    assert {axes.get_xlim() for axes in figure.axes} == {(0.5, 100.5)}
    assert labels(memory) == ["reserved, with cache", "budget", "measured peak", "predicted peak"]
    assert labels(micro_batches) == ["micro-batches per step", "images in the largest micro-batch"]
    assert labels(speed) == ["each step", "running median"]


def test_events_are_marked(tmp_path):
    rows = [
        row(1),
        row(2, "out-of-memory at 64", "retried 64", "shrunk 64 to 32", micro_batches=(32,) * 4),
        row(3, "grew 32 to 64"),
    ]
    memory, micro_batches, _ = draw(told(tmp_path, rows)).axes
    assert labels(memory)[-1] == "out-of-memory, survived"
    assert memory.collections[-1].get_offsets().tolist() == [[2, 7000 / 1024]]
    assert labels(micro_batches)[-2:] == ["shrunk", "grew"]
    assert [marks.get_offsets().tolist() for marks in micro_batches.collections] == [[[2, 32]], [[3, 64]]]


def test_a_resume_is_marked_once_in_the_legend(tmp_path):
    write(tmp_path, [row(1)])
    for step in (2, 3):
        write(tmp_path, [row(step, epoch=step)], resume=True)
    assert labels(draw(read_rows(tmp_path / "memory.csv")).axes[0]).count("resumed") == 1


def test_steps_that_were_not_timed_leave_the_speed_empty(tmp_path):
    speed = draw(told(tmp_path, [row(step, step_ms=None) for step in (1, 2)])).axes[2]
    assert all(len(line.get_xdata()) == 0 for line in speed.get_lines())


@pytest.mark.parametrize(("epochs", "lines_seen"), [(1, False), (60, True), (61, False)])
def test_epochs_are_lines_while_they_are_few(tmp_path, epochs, lines_seen):
    figure = draw(told(tmp_path, [row(step, epoch=step) for step in range(1, epochs + 1)]))
    assert ("new epoch" in figure.axes[2].get_xlabel()) is lines_seen


def test_thinning_keeps_highest_peak_lowest_budget_and_events(tmp_path):
    special = {
        700: row(700, peak=7300),
        1234: row(1234, budget=5000, peak=4900),
        1500: row(1500, "out-of-memory at 64"),
        1501: row(1501, "out-of-memory at 64"),
    }
    rows = told(tmp_path, [special.get(step) or row(step) for step in range(1, 2001)])
    kept = thin(rows, bins=50)
    steps = [int(each["step"]) for each in kept]
    assert steps == sorted(set(steps))
    assert special.keys() <= set(steps)
    assert len(kept) <= 3 * 50 + 2
    assert thin(rows, bins=2000) == rows
    memory = draw(rows).axes[0]
    assert len(memory.collections[-1].get_offsets()) == 2
    assert max(memory.get_lines()[1].get_ydata()) == 7300 / 1024


def test_a_file_of_an_earlier_version_is_read_and_continued(tmp_path):
    """Its column of reserved memory is called `held_mib`."""
    journal = Journal(tmp_path)
    journal.add(row(1))
    journal.close(updates_expected=1)
    file = tmp_path / "memory.csv"
    file.write_text(file.read_text().replace("reserved_mib", "held_mib"))
    resumed = Journal(tmp_path, resume=True)
    resumed.add(row(2))
    resumed.close(updates_expected=1)
    assert [each["step"] for each in read_rows(file)] == ["1", "2"]
    assert all(float(each["reserved_mib"]) > 0 for each in read_rows(file))
    assert "held_mib" in file.read_text()
