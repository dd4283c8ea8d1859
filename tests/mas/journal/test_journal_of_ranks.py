"""The files, the summary and the picture of a run in which several processes share each batch."""

import json

import pytest
from matplotlib.colors import to_hex

from yolov12.mas.journal.journal import Journal, Row, read_ranks, read_rows
from yolov12.mas.journal.picture import draw

GIB = 2**30
MIB = 2**20


def row(step, images, *events, epoch=1, peak=7000, predicted=None, budget=8000, step_ms=500.0, micro_batch=16):
    """Return a row. Without images it has the values that the engine writes for an empty share."""
    parts = tuple(min(micro_batch, images - start) for start in range(0, images, micro_batch))
    peak = peak if images else 0
    sizes = {"predicted": peak if predicted is None else predicted, "peak": peak, "reserved": 7100, "free": 900}
    return Row(
        step=step,
        epoch=epoch,
        images=images,
        micro_batches=parts,
        plan="",
        image_size="640x640",
        max_boxes=31,
        step_ms=step_ms if images or step_ms is None else 0.02,
        events=events,
        budget_bytes=budget * MIB,
        **{f"{name}_bytes": int(size * MIB) for name, size in sizes.items()},
    )


def write(folder, *journals, expected=None, **options):
    """Let ranks write their rows and close, rank 0 last. Return rank 0's summary."""
    ranks = [Journal(folder, rank=rank, ranks=len(journals), **options) for rank in range(len(journals))]
    for journal, rows in zip(ranks, journals, strict=True):
        for each in rows:
            journal.add(each)
    return [journal.close(updates_expected=expected) for journal in reversed(ranks)][-1]


def steps(folder, rank):
    rows = read_rows(folder / f"memory.rank{rank}.csv" if rank else folder / "memory.csv")
    return [int(each["step"]) for each in rows]


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_each_rank_has_a_file_and_rank_0_the_summary_and_the_picture(tmp_path):
    write(tmp_path, [row(1, 40)], [row(1, 20)], [row(1, 4)])
    assert names(tmp_path) == {"memory.csv", "memory.rank1.csv", "memory.rank2.csv", "memory.json", "memory.png"}
    assert {rank: rows[0]["images"] for rank, rows in read_ranks(tmp_path).items()} == {0: "40", 1: "20", 2: "4"}
    header, _ = (tmp_path / "memory.rank1.csv").read_text().splitlines()
    assert header == (tmp_path / "memory.csv").read_text().splitlines()[0]


def test_another_rank_sums_up_its_own_share_and_writes_nothing_else(tmp_path):
    (tmp_path / "memory.csv").write_text("of rank 0")
    journal = Journal(tmp_path, rank=1, ranks=2)
    journal.add(row(1, 24, peak=5000))
    summary = journal.close(updates_expected=1)
    assert names(tmp_path) == {"memory.csv", "memory.rank1.csv"}
    assert (summary.images, summary.peak_max_mib, summary.out_of_memories, summary.ranks) == (24, 5000.0, 0, ())
    assert summary.updates_expected == 1


def test_another_rank_without_a_step_leaves_no_file(tmp_path):
    journal = Journal(tmp_path, rank=1, ranks=2)
    journal.flush()
    assert journal.close(updates_expected=1).updates == 0
    assert names(tmp_path) == set()


def test_the_summary_is_of_all_ranks(tmp_path):
    first = [
        row(1, 40, "out-of-memory at 32", "retried 32", "shrunk 32 to 16", step_ms=400.0, micro_batch=32),
        row(2, 32, peak=6000, step_ms=400.0),
        row(3, 20, step_ms=400.0),  # last batch of the epoch
        row(4, 40, step_ms=400.0),
    ]
    second = [
        row(1, 24, "out-of-memory at 16", step_ms=800.0),
        row(2, 32, "grew 8 to 16", peak=9000, budget=9500, step_ms=640.0),
        row(3, 12, step_ms=100.0, micro_batch=4),
        row(4, 24, predicted=7700, step_ms=800.0),
    ]
    summary = write(tmp_path, first, second, expected=4)
    assert (summary.updates, summary.updates_expected, summary.images) == (4, 4, 3 * 64 + 32)
    assert (summary.out_of_memories, summary.retries, summary.shrinks, summary.grows) == (2, 1, 1, 1)
    assert (summary.peak_mean_mib, summary.peak_max_mib) == (7125.0, 9000.0)  # 57000 / 8
    assert (summary.budget_min_mib, summary.budget_max_mib) == (8000.0, 9500.0)
    assert summary.prediction_error_percent == 0.0
    assert (summary.micro_batch_min, summary.micro_batch_median, summary.micro_batch_max) == (4, 16, 32)
    # 64 images in 0.8, 0.64 and 0.8 s, and 32 in 0.4 s: 80, 100, 80 and 80 images/s. Each rank alone has another
    # median.
    assert summary.images_per_s == 80.0
    assert [each.rank for each in summary.ranks] == [0, 1]
    own = summary.ranks[1]
    assert (own.images, own.out_of_memories, own.grows, own.peak_max_mib) == (92, 1, 1, 9000.0)
    assert own.images_per_s == 40.0  # 30, 50, 120, 30
    assert [(each.share_min, each.share_max) for each in summary.ranks] == [(32, 40), (24, 32)]
    assert json.loads((tmp_path / "memory.json").read_text())["ranks"][1]["share_max"] == 32


def test_prediction_errors_of_all_ranks_count(tmp_path):
    summary = write(tmp_path, [row(1, 8, predicted=7000)], [row(1, 8, predicted=7700)], [row(1, 8, predicted=7700)])
    assert summary.prediction_error_percent == pytest.approx(10.0)


def test_a_step_without_images_disturbs_nothing(tmp_path):
    summary = write(
        tmp_path,
        [row(1, 32, step_ms=320.0), row(2, 32, step_ms=320.0)],
        [row(1, 0, budget=8100, step_ms=None), row(2, 0, "shrunk 16 to 8", budget=8100)],
        [row(1, 0), row(2, 16, step_ms=160.0)],
    )
    assert (summary.images, summary.shrinks) == (80, 1)
    assert (summary.peak_mean_mib, summary.peak_sd_mib, summary.prediction_error_percent) == (7000.0, 0.0, 0.0)
    assert (summary.micro_batch_min, summary.budget_max_mib) == (16, 8100.0)
    assert summary.images_per_s == 125.0  # median of 32 and 48 images in 0.32 s
    nothing, some = summary.ranks[1:]
    assert (nothing.images, nothing.peak_max_mib, nothing.images_per_s) == (0, None, None)
    assert (some.images, some.images_per_s) == (16, 100.0)
    assert summary.as_text().splitlines()[-2] == "  rank 1: no images"


def test_a_step_with_an_unknown_time_has_no_speed(tmp_path):
    summary = write(
        tmp_path,
        [row(1, 32, step_ms=320.0), row(2, 32, step_ms=320.0)],
        [row(1, 32, step_ms=None), row(2, 32, step_ms=640.0)],
    )
    assert summary.images_per_s == 100.0


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    journal = Journal(tmp_path, ranks=2)
    other = Journal(tmp_path, rank=1, ranks=2)
    for each in (journal, other):
        each.add(row(1, 32))
        each.add(row(2, 32))
        each.flush()
    path = tmp_path / "memory.rank1.csv"
    path.write_bytes(path.read_bytes()[:-3])
    summary = journal.close(updates_expected=2)
    assert (summary.updates, summary.images) == (2, 96)
    other.close(updates_expected=2)


def test_ranks_with_another_folder_are_said_to_be_missing(tmp_path):
    journal = Journal(tmp_path, ranks=3)
    journal.add(row(1, 32))
    summary = journal.close(updates_expected=None)
    assert (summary.ranks_missing, summary.images, summary.ranks) == (2, 32, ())
    assert summary.as_text().endswith("\n  without what other ranks did: 2 journals are not in this folder")


def test_the_text_has_a_line_a_rank(tmp_path):
    journals = [Journal(tmp_path, rank=rank, ranks=2) for rank in range(2)]
    journals[0].add(row(1, 40, "out-of-memory at 32", step_ms=400.0))
    journals[1].add(row(1, 24, budget=9000, step_ms=800.0, peak=7100))
    journals[0].add(row(2, 32, step_ms=400.0, micro_batch=32))
    journals[1].add(row(2, 32, step_ms=800.0, budget=9500))
    journals[0].busy(90.0)
    journals[1].close(updates_expected=2)
    assert journals[0].close(updates_expected=2).as_text() == (
        "memory: 1 out-of-memory survived, 0 images lost, 2 of 2 updates\n"
        "  peak 7,025 ± 43 MiB, at most 7,100, of a budget of 8,000 to 9,500 MiB; predicted to 0.0 %\n"
        "  micro-batches of 16 to 32 images, median 16, shrunk 0 times, grown 0 times; 80.0 images/s; "
        "GPU of rank 0 busy 90 % of the time\n"
        "  rank 0: 32 to 40 images a step in micro-batches of 16 to 32, 90.0 images/s, "
        "peak 7,000 of 8,000 MiB, 1 out-of-memory\n"
        "  rank 1: 24 to 32 images a step in micro-batches of 16, 35.0 images/s, "
        "peak 7,100 of 9,000 to 9,500 MiB, 0 out-of-memories"
    )


def lines_of_ranks(summary):
    return [line.strip() for line in summary.as_text().splitlines()[3:]]


def test_of_many_ranks_the_text_tells_which_stand_out(tmp_path):
    journals = [[row(1, 8)] for _ in range(9)]
    journals[6] = [row(1, 8, "out-of-memory at 8", "out-of-memory at 8")]
    journals[7] = [row(1, 8, "out-of-memory at 8")]
    journals[4] = [row(1, 8, step_ms=900.0)]
    fourth, sixth, more = lines_of_ranks(write(tmp_path, *journals))
    assert fourth.startswith("rank 4: 8 images a step")
    assert sixth.startswith("rank 6:")
    assert more == "7 more ranks, of which none was slower or had more out-of-memories"
    assert len(lines_of_ranks(write(tmp_path, *journals[:8]))) == 8


def test_the_slowest_may_have_most_failures_and_there_may_be_none(tmp_path):
    journals = [[row(1, 8)] for _ in range(9)]
    journals[4] = [row(1, 8, "out-of-memory at 8", step_ms=900.0)]
    assert len(lines_of_ranks(write(tmp_path, *journals))) == 2
    journals[4] = [row(1, 8, step_ms=900.0)]
    slowest, more = lines_of_ranks(write(tmp_path, *journals))
    assert slowest.startswith("rank 4:")
    assert more.startswith("8 more ranks")


@pytest.mark.parametrize("now", [1, 2])
def test_a_new_run_removes_what_a_larger_team_left(tmp_path, now):
    write(tmp_path, *[[row(1, 8), row(2, 8)]] * 4)
    (tmp_path / "memory.rankings.csv").touch()  # a file of the user
    summary = write(tmp_path, *[[row(1, 8)]] * now)
    assert summary.images == 8 * now
    assert len(summary.ranks) == (now if now > 1 else 0)
    assert {name for name in names(tmp_path) if "rank" in name} == {"memory.rankings.csv"} | (
        {"memory.rank1.csv"} if now > 1 else set()
    )


def test_a_new_run_does_not_count_what_another_left_in_the_name_of_a_rank_that_writes_elsewhere(tmp_path):
    write(tmp_path, [row(1, 8)], [row(1, 8)])
    journal = Journal(tmp_path, ranks=2)
    journal.add(row(1, 8))
    summary = journal.close(updates_expected=None)
    assert (summary.images, summary.ranks_missing) == (8, 1)


def test_a_new_run_removes_its_own_file_where_rank_0_cannot(tmp_path):
    write(tmp_path, [row(1, 8)], [row(1, 8), row(2, 8)])
    Journal(tmp_path, rank=1, ranks=2)
    assert names(tmp_path) == {"memory.csv", "memory.json", "memory.png"}


def test_ranks_may_begin_in_any_order(tmp_path):
    write(tmp_path, [row(1, 8)], [row(1, 8)])
    second = Journal(tmp_path, rank=1, ranks=2)
    first = Journal(tmp_path, ranks=2)
    for journal in (second, first):
        journal.add(row(1, 16))
    second.close(updates_expected=None)
    assert first.close(updates_expected=None).images == 32


def test_a_resume_after_a_save_cuts_every_file(tmp_path):
    write(tmp_path, [row(step, 16) for step in (1, 2, 3)], [row(step, 16) for step in (1, 2, 3, 4)])
    summary = write(tmp_path, [row(3, 24)], [row(3, 8)], resume=True, steps=2)
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == [1, 2, 3]
    assert [rows[2]["events"] for rows in read_ranks(tmp_path).values()] == ["resumed after step 2"] * 2
    assert (summary.updates, summary.images, summary.ranks[1].images) == (3, 96, 40)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_resume_from_the_end_of_an_epoch_cuts_every_file(tmp_path, order):
    """The steps of the second epoch are made again, whichever rank opens its file first."""
    before = [row(1, 16), row(2, 16), row(3, 16, epoch=2), row(4, 16, epoch=2)]
    write(tmp_path, before, before[:3])
    journals = {rank: Journal(tmp_path, resume=True, epochs=1, rank=rank, ranks=2) for rank in order}
    for rank in (1, 0):
        journals[rank].add(row(3, 16, epoch=2))
        summary = journals[rank].close(updates_expected=1)
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == [1, 2, 3]
    assert [rows[2]["events"] for rows in read_ranks(tmp_path).values()] == ["resumed"] * 2
    assert (summary.updates, summary.updates_expected, summary.updates_repeated, summary.images) == (3, 3, 0, 96)


def test_after_a_resume_all_ranks_count_alike_whatever_rows_a_kill_took(tmp_path):
    write(tmp_path, [row(step, 16) for step in (1, 2, 3)], [row(1, 16)], [row(step, 16) for step in (1, 2, 3, 4, 5)])
    journals = [Journal(tmp_path, rank=rank, ranks=3, resume=True) for rank in range(3)]
    assert [journal.next_step for journal in journals] == [4, 4, 4]
    for journal in journals:
        journal.add(row(4, 16, epoch=2))
    for journal in reversed(journals):
        summary = journal.close(updates_expected=None)
    assert [steps(tmp_path, rank) for rank in range(3)] == [[1, 2, 3, 4], [1, 4], [1, 2, 3, 4]]
    assert [rows[-1]["events"] for rows in read_ranks(tmp_path).values()] == ["resumed"] * 3
    assert summary.images == 16 * 10


def test_a_rank_that_is_new_after_a_resume_counts_on_with_the_others(tmp_path):
    write(tmp_path, [row(1, 32), row(2, 32)])
    summary = write(tmp_path, [row(3, 16, epoch=2)], [row(3, 16, epoch=2)], resume=True, expected=1)
    assert steps(tmp_path, 1) == [3]
    assert (summary.updates, summary.updates_expected, summary.images) == (3, 3, 96)


@pytest.mark.parametrize("saved", [None, 3])
def test_a_rank_that_is_no_more_after_a_resume_is_part_of_the_run(tmp_path, saved):
    """Three ranks make an epoch of two steps and one step of the next; one rank resumes, with or without that step."""
    before = [row(1, 16), row(2, 16), row(3, 16, epoch=2)]
    write(tmp_path, before, before, [*before, row(4, 16, epoch=2)])
    resumed = [row(4, 48, epoch=2)]
    summary = write(tmp_path, resumed, resume=True, steps=saved)
    assert steps(tmp_path, 2) == [1, 2, 3]
    assert summary.updates == (3 if saved is None else 4)
    assert summary.updates_repeated == (1 if saved is None else 0)
    assert summary.images == 48 * summary.updates
    assert [each.rank for each in summary.ranks] == [0, 1, 2]


def test_updates_that_a_resume_makes_again_count_once_on_every_rank(tmp_path):
    before = [row(1, 16), row(2, 16, epoch=2)]
    write(tmp_path, before, before)
    after = [row(3, 16, epoch=2)]
    summary = write(tmp_path, after, after, resume=True)
    assert (summary.updates, summary.updates_repeated, summary.images) == (2, 1, 64)
    assert [(each.updates, each.images) for each in summary.ranks] == [(2, 32), (2, 32)]


def test_losses_and_utilisation_of_before_a_resume_are_those_of_rank_0(tmp_path):
    for resume, losses, percent in ((False, 3, 90.0), (True, 4, 100.0)):
        journals = [Journal(tmp_path, rank=rank, ranks=2, resume=resume) for rank in range(2)]
        for journal in journals:
            journal.add(row(journal.next_step, 16, epoch=journal.next_step))
        journals[0].lost(losses)
        journals[0].busy(percent)
        second, first = (journal.close(updates_expected=None) for journal in reversed(journals))
    assert (first.images_lost, first.gpu_utilisation_percent) == (7, 95.0)
    assert (second.images_lost, second.gpu_utilisation_percent) == (0, None)


def colors(axes):
    return [to_hex(line.get_color()) for line in axes.get_lines() if len(line.get_xdata())]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def told(tmp_path, *journals):
    write(tmp_path, *journals)
    others = read_ranks(tmp_path)
    return draw(others.pop(0), others)


def test_the_picture_shows_every_rank_in_a_colour_of_its_own(tmp_path):
    count = 8
    figure = told(
        tmp_path, *[[row(step, 4 + rank, peak=1024 * (rank + 1)) for step in (1, 2)] for rank in range(count)]
    )
    memory, shares, speed = figure.axes
    assert labels(memory) == ["measured peak", "budget"]
    budgets_and_peaks = [line for line in memory.get_lines() if len(line.get_xdata())]
    assert [line.get_ydata()[0] for line in budgets_and_peaks[1::2]] == list(range(1, count + 1))
    assert {line.get_ydata()[0] for line in budgets_and_peaks[::2]} == {8000 / 1024}
    of_ranks = colors(shares)
    assert len(set(of_ranks)) == count
    assert colors(speed) == of_ranks
    assert colors(memory)[::2] == colors(memory)[1::2] == of_ranks


def test_the_legend_names_the_ranks_within_the_picture(tmp_path):
    for count, named in ((2, ["rank 0", "rank 1"]), (20, [f"rank {rank}" for rank in (*range(0, 20, 3), 19)])):
        figure = told(tmp_path, *[[row(1, 8)]] * count)
        figure.canvas.draw()
        (legend,) = figure.axes[0].artists
        assert [text.get_text() for text in legend.get_texts()] == named
        box = legend.get_window_extent()
        assert box.y1 <= 800
        assert box.x0 >= 0


def test_shares_lie_one_upon_the_other_and_make_up_the_batch(tmp_path):
    figure = told(tmp_path, [row(1, 40), row(2, 32)], [row(1, 24), row(2, 0)], [row(1, 0), row(2, 32)])
    lines = [list(line.get_ydata()) for line in figure.axes[1].get_lines() if len(line.get_xdata())]
    assert lines == [[40, 32], [64, 32], [64, 64]]


def test_a_step_without_images_has_no_peak_and_no_speed(tmp_path):
    figure = told(tmp_path, [row(step, 32) for step in (1, 2, 3)], [row(1, 8), row(2, 0), row(3, 8)])
    peak, speed = figure.axes[0].get_lines()[3], figure.axes[2].get_lines()[1]
    assert list(peak.get_xdata()) == list(speed.get_xdata()) == [1, 3]
    assert list(speed.get_ydata()) == [16.0, 16.0]


def test_events_are_marked_in_the_colour_of_their_rank(tmp_path):
    quiet = [row(step, 32) for step in (1, 2, 3)]
    busy = [row(1, 32), row(2, 32, "out-of-memory at 16", "shrunk 16 to 8"), row(3, 32, "grew 8 to 16")]
    memory, shares, _ = told(tmp_path, quiet, busy).axes
    assert labels(memory)[-1] == "out-of-memory, survived"
    assert labels(shares) == ["micro-batch shrunk", "micro-batch grew"]
    (failure,) = memory.collections
    assert failure.get_offsets().tolist() == [[2, 7000 / 1024]]
    assert to_hex(failure.get_facecolor()[0]) == colors(shares)[1]
    marks = [each for each in shares.collections if len(each.get_offsets()) == 1 and each.get_offsets()[0][0]]
    assert [each.get_offsets().tolist() for each in marks] == [[[2, 48]], [[3, 48]]]  # in the middle of the rank's band


def test_a_resume_is_marked_once_for_all_ranks(tmp_path):
    write(tmp_path, [row(1, 8)], [row(1, 8)])
    write(tmp_path, [row(2, 8)], [row(2, 8)], resume=True)
    others = read_ranks(tmp_path)
    memory = draw(others.pop(0), others).axes[0]
    assert labels(memory).count("resumed") == 1
    assert len(memory.collections[0].get_segments()) == 1


def test_of_a_long_run_the_same_steps_of_every_rank_are_drawn(tmp_path):
    count = 1500
    first = [row(step, 20 if step % 50 else 7, peak=7500 if step == 701 else 7000) for step in range(1, count + 1)]
    second = [row(step, 12 if step % 50 else 4, budget=5000 if step == 903 else 8000) for step in range(1, count + 1)]
    second[1233] = row(1234, 12, "out-of-memory at 12")
    second[799] = row(800, 4, "retried 4")
    memory, shares, _ = told(tmp_path, first, second).axes
    budgets, peaks = (memory.get_lines()[index] for index in (2, 1))
    drawn = list(budgets.get_xdata())
    assert drawn == list(peaks.get_xdata())
    assert {701, 800, 903, 1234} <= set(drawn)
    assert len(drawn) <= count * 0.9
    assert min(budgets.get_ydata()) == 5000 / 1024
    assert max(peaks.get_ydata()) == 7500 / 1024
    tops = [set(line.get_ydata()) for line in shares.get_lines()[:2]]
    assert tops == [{20}, {32}]  # smaller last batches of epochs are left out


@pytest.mark.picture
def test_the_picture_of_many_ranks_has_the_usual_size(tmp_path):
    write(tmp_path, *[[row(step, 2) for step in range(1, 60)]] * 40)
    header = (tmp_path / "memory.png").read_bytes()[:24]
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1200, 800)
