"""Output of the engine for users: the progress bar, the log, memory.json and memory.png."""

import re
from itertools import pairwise
from statistics import fmean

import cv2
import pytest

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture(scope="module")
def run(trainings, tmp_path_factory):
    return trainings.train(tmp_path_factory.mktemp("shown"), micro_batch=2)


def ends(line):
    """Return the positions at which the words of a line end."""
    return [word.end() for word in re.finditer(r"\S+", line)]


def test_the_progress_bar_has_a_column_under_its_header(run):
    (header, *_) = [line for line in run.log.splitlines() if "GPU_mem" in line]
    drawn = [_ANSI.sub("", row).partition(": ")[0] for row in re.split(r"[\r\n]", run.bar)]
    rows = [row for row in drawn if " 1/2 " in row or " 2/2 " in row]
    assert len(rows) >= 2
    for row in rows:
        found = re.fullmatch(r" +[12]/2 +(2x4  (\d\.\d+)/(\d\d?\.?\d*)G)( +[\d.e+-]+){3} +\d+ +64", row)
        assert found is not None, row
        peak, budget = float(found[2]), float(found[3])
        assert 0.1 < peak < budget
        # Epoch, then the memory column with its two words, then losses, instances and size.
        first, _, *others = ends(row)
        assert [first, *others] == ends(header)
    last = run.memory[-1]
    assert float(found[2]) == pytest.approx(float(last["peak_mib"]) / 1024, rel=5e-3)
    assert float(found[3]) == pytest.approx(float(last["budget_mib"]) / 1024, rel=5e-3)


def test_without_the_engine_the_progress_bar_is_ultralytics_own(trainings, tmp_path):
    stock = trainings.train(tmp_path, mas=False, epochs=1)
    (header,) = [line for line in stock.log.splitlines() if "GPU_mem" in line]
    assert header.startswith("      Epoch    GPU_mem   box_loss")
    assert "memory:" not in stock.log


def test_the_log_tells_the_chosen_group_and_at_the_end_the_summary(run):
    lines = run.log.splitlines()
    (chosen,) = [line for line in lines if "(bn_group)" in line]
    assert chosen.startswith("memory: BatchNorm sees 2 images at once (bn_group) in this run; other processes hold ")
    at = next(index for index, line in enumerate(lines) if "survived" in line)
    assert lines[at] == "memory: 0 out-of-memories survived, 0 images lost, 8 of 8 updates"
    assert re.fullmatch(
        r"  peak [\d,]+ ± \d+ MiB, at most [\d,]+, of a budget of [\d,]+( to [\d,]+)? MiB; predicted to \d+\.\d %",
        lines[at + 1],
    )
    assert re.fullmatch(r"  micro-batches of 2 images, shrunk 0 times, grown 0 times; [\d.]+ images/s", lines[at + 2])
    assert at == len(lines) - 3  # the last thing a user reads


def test_the_log_names_the_checkpoints_and_no_temporary_file(run):
    stripped = [line for line in run.log.splitlines() if "Optimizer stripped" in line]
    assert [re.sub(r", [\d.]+MB$", "", line) for line in stripped] == [
        f"Optimizer stripped from {run.folder / 'weights' / name}" for name in ("last.pt", "best.pt")
    ]
    assert "unfinished" not in run.log


def test_memory_json_sums_up_memory_csv(trainings, run):
    summary, rows = run.summary, run.memory
    assert (summary["updates"], summary["updates_expected"], summary["images"]) == (8, 8, 2 * trainings.IMAGES)
    assert summary["images_lost"] == summary["out_of_memories"] == 0
    assert summary["peak_mean_mib"] == pytest.approx(fmean(float(row["peak_mib"]) for row in rows))
    assert summary["peak_max_mib"] == max(float(row["peak_mib"]) for row in rows)
    assert summary["micro_batch_min"] == summary["micro_batch_max"] == 2
    assert summary["gpu_utilisation_percent"] is None
    assert all(int(later["step"]) == int(earlier["step"]) + 1 for earlier, later in pairwise(rows))


def test_memory_png_is_a_picture(run):
    picture = cv2.imread(str(run.folder / "memory.png"))
    assert picture.shape == (800, 1200, 3)
    assert picture.std() > 10
