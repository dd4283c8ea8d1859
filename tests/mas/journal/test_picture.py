"""What memory.png says about a run: its title, its labels, and what it draws where memory was never tight."""

import time
from itertools import combinations

import pytest

from yolov12.mas.journal.columns import COLUMNS
from yolov12.mas.journal.conclusion import facts_of
from yolov12.mas.journal.explanation import explain
from yolov12.mas.journal.highlights import Highlight, choose, highlights, highlights_of_ranks
from yolov12.mas.journal.labels import place
from yolov12.mas.journal.picture import draw, thin

FIELDS = [column.name for column in COLUMNS]


def row(step, events="", *, images=64, size=64, peak=900, budget=1000, pixels=640, plan=""):
    """Return a row of memory.csv; `size` is the largest micro-batch."""
    parts = " ".join(str(min(size, images - start)) for start in range(0, images, size))
    values = [step, 1 + step // 50, images, parts, plan, f"{pixels}x{pixels}", 9]
    values += [peak, peak, peak, 100, budget, 500.0, 128.0, *[""] * 6, 0, events]
    return dict(zip(FIELDS, map(str, values), strict=True))


def run(count=30, **changes):
    """Return the rows of a run. `changes` has the arguments of single steps: `step_7=...`."""
    return [row(step, **changes.get(f"step_{step}", changes.get("every", {}))) for step in range(1, count + 1)]


def texts(rows):
    return [each.text for each in highlights(rows)]


def test_a_run_with_much_room_shows_how_much_and_no_line_far_above_its_peaks():
    figure = draw(run(every={"peak": 1800, "budget": 128000}))
    room, peaks, speed = figure.axes
    assert figure.texts[0].get_text() == "Memory was never tight: the peak was at most 1.4 % of the budget"
    assert [text.get_text() for text in room.texts] == ["peak 1.8 GiB = 1.4 %", "budget: 125 GiB"]
    assert room.get_xlim() == (0, 100)
    assert [bar.get_width() for bar in room.patches] == [100, pytest.approx(1.41, abs=0.01)]
    assert peaks.get_ylim()[1] < 2.5  # GiB
    assert "budget" not in peaks.get_legend_handles_labels()[1]
    assert speed.get_xlim() == peaks.get_xlim() == (0.5, 30.5)


def test_with_several_ranks_each_has_a_bar_of_its_own():
    figure = draw(run(every={"peak": 100}), {1: run(every={"peak": 200})})
    assert [text.get_text() for text in figure.axes[0].texts] == [
        *("peak 100 MiB = 10 %", "budget of rank 0: 1000 MiB"),
        *("peak 200 MiB = 20 %", "budget of rank 1: 1000 MiB"),
    ]


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        (run(), "Every batch fitted as a whole: the peak was at most 90 % of the budget"),
        (
            run(every={"size": 16}, step_1={"size": 16, "events": "batch of 64 did not fit"}),
            "batch=64 did not fit into the budget of 1.0 GiB: ran as 4 × 16",
        ),
        (
            run(
                every={"size": 16, "plan": "recompute 2"},
                step_1={"size": 16, "plan": "recompute 2", "events": "batch of 64 did not fit"},
            ),
            "batch=64 did not fit into the budget of 1.0 GiB: ran as 4 × 16 with layers recomputed",
        ),
        (run(every={"size": 16}), "Batches of 64 ran as 4 × 16: the peak was at most 90 % of the budget"),  # as asked
        (
            run(step_9={"events": "out-of-memory at 64; out-of-memory at 64; shrunk 64 to 32", "size": 32}),
            "The run survived 2 out-of-memories: batches of 64 ran in micro-batches of 32 to 64",
        ),
        (
            run(step_9={"events": "shrunk 64 to 32", "size": 32, "budget": 700}),
            "Other processes took up to 300 MiB: batches of 64 ran in micro-batches of 32 to 64",
        ),
        (
            run(step_9={"events": "out-of-memory at 1; image size 640 to 448"}),
            "Memory was so short that images were reduced to 448 pixels",
        ),
        (run(step_9={"events": "image size 448 to 640"}), "Every batch fitted as a whole"),
        (run(step_9={"events": "over the limit of 1,000 MiB"}), "The peak was above the memory limit in 1 step"),
    ],
)
def test_the_title_is_the_conclusion(rows, headline):
    assert draw(rows).texts[0].get_text().startswith(headline)


def test_the_title_and_the_last_line_of_the_log_say_the_same():
    rows = run(every={"size": 32}, step_1={"size": 16, "events": "batch of 64 did not fit"}, step_7={})
    line = explain({0: rows}, is_exact=True, bn_group=16)
    title, _, more = line.replace(" in 29 of 30 batches", "").partition(", the same gradient")
    assert more
    assert facts_of({0: rows}).headline() == title


def test_the_second_line_has_the_figures():
    rows = run(every={"size": 16}, step_20={"size": 16, "events": "resumed after step 19"})
    assert facts_of({0: rows}).details() == (
        "30 updates · batch of 64, mostly run as 4 × 16 · peak at most 90 % of the budget (900 MiB of 1000 MiB) · "
        "128 images/s · resumed once"
    )


def test_events_are_told_in_words():
    rows = run(
        step_2={"events": "out-of-memory at 64; retried 64"},
        step_3={"events": "plan 0 to 2"},
        step_4={"events": "waited 12 s for room; image size 640 to 448"},
        step_5={"events": "groups of 4"},
        step_6={"events": "groups of 4"},  # is told once
        step_7={"events": "image size 448 to 640"},
        step_8={"events": "plan 2 to 0"},
        step_9={"events": "shrunk 64 to 24", "size": 24},
        step_10={"events": "grew 24 to 64"},
        step_11={"events": "over the limit of 2,048 MiB"},
        step_12={"events": "resumed after step 11"},
        step_13={"events": "out-of-memory in the optimizer"},
    )
    assert texts(rows) == [
        "out of memory at 64 images, survived",
        "checkpointing started",
        "images reduced from 640 to 448 pixels",
        "waited 12 s for other processes",
        "BatchNorm in groups of 4",
        "images enlarged from 448 to 640 pixels",
        "checkpointing ended",
        "batch split into 2 × 24 + 16",
        "batch ran as one micro-batch",
        "peak above the limit of 2.0 GiB",
        "resumed after an interruption",
        "out of memory in the optimizer, survived",
    ]


def test_memory_that_others_take_and_release_is_told_with_its_consequence():
    budgets = {step: 1000 + step % 2 * 20 for step in range(1, 31)}  # noise
    budgets |= dict.fromkeys(range(10, 20), 500)
    rows = [
        row(step, "shrunk 64 to 32" if step == 11 else "", size=32 if 11 <= step < 20 else 64, budget=budget)
        for step, budget in budgets.items()
    ]
    assert texts(rows) == ["other processes took 520 MiB: batch split into 2 × 32", "other processes released 520 MiB"]


def test_memory_that_is_taken_over_two_steps_is_one_event():
    budgets = [1000, 1000, 800, 500, *[500] * 10]
    assert texts([row(step, budget=budget) for step, budget in enumerate(budgets, 1)]) == [
        "other processes took 500 MiB"
    ]


def test_a_resumed_run_may_have_another_budget():
    assert texts([row(1), row(2, "resumed", budget=500)]) == ["resumed after an interruption"]


def test_ranks_are_named_where_they_differ():
    first, second = (
        run(step_3={"events": "resumed"}),
        run(step_3={"events": "resumed"}, step_5={"events": "plan 0 to 1"}),
    )
    assert [each.text for each in highlights_of_ranks({0: first, 1: second})] == [
        "resumed after an interruption",
        "rank 1: checkpointing started",
    ]


def test_the_most_important_are_chosen_and_say_how_many_there_are():
    failures = [Highlight(step, "out-of-memory", "out of memory", 9) for step in range(20, 30)]
    chosen = choose([Highlight(1, "grew", "grew", 3), *failures, Highlight(40, "took", "took", 6)], most=4)
    assert [each.text for each in chosen] == ["out of memory (in 10 steps)", "out of memory", "out of memory", "took"]


def test_a_long_run_beside_a_restless_neighbour_is_told_in_little_time():
    """A hundred thousand steps, in every fifth of which a neighbour takes memory, and the batch is split."""
    usual, tight = row(1), row(1, "shrunk 64 to 32", size=32, budget=500)
    rows = [{**(usual if step % 5 else tight), "step": str(step)} for step in range(1, 100_001)]
    begin_s = time.process_time()
    told = highlights(rows)
    assert time.process_time() - begin_s < 20  # 1 s; it took many minutes
    assert told[0].text == "other processes took 500 MiB: batch split into 2 × 32"
    assert len(told) == 40_000 - 1
    assert len(thin(rows)) <= 600 * 6


def test_labels_do_not_overlap_and_stay_in_the_panel():
    found = [Highlight(7 * index % 100, "kind", "words " * (1 + index % 7), index % 9) for index in range(40)]
    labels = place(found, 0.5, 100.5)
    assert len(labels) >= 5
    assert all(label.left >= 0 and label.right <= 1.02 for label in labels)
    for one, other in combinations(labels, 2):
        assert one.lane != other.lane or one.right <= other.left or other.right <= one.left
    most = max(each.importance for each in found)
    assert most in {label.highlight.importance for label in labels}


def test_labels_are_inside_the_drawn_panel():
    rows = run(
        60,
        **{f"step_{step}": {"events": "out-of-memory at 64; shrunk 64 to 32", "size": 32} for step in (2, 30, 59)},
        step_31={"events": "image size 640 to 448"},
    )
    figure = draw(rows)
    figure.canvas.draw()
    panel = figure.axes[0].get_window_extent()
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= 4
    for box in boxes:
        assert panel.x0 - 1 <= box.x0 <= box.x1 <= panel.x1 + 1
        assert panel.y0 <= box.y0 <= box.y1 <= panel.y1 + 1
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    title = figure.texts[0].get_window_extent()
    assert title.x1 <= 1200


def test_a_long_title_is_inside_the_picture():
    plan, events = "recompute head", "batch of 64 did not fit"
    tight = {"plan": plan, "budget": 127_900, "peak": 99_999}
    rows = run(every={**tight, "size": 16}, step_1={**tight, "size": 8, "events": events, "budget": 112_000})
    title = draw(rows).texts[0]
    assert len(title.get_text()) > 110
    assert title.get_window_extent().x1 <= 1200


def test_curves_differ_in_more_than_their_colour():
    for axes in draw(run(60)).axes[:2]:
        curves = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert len({(line.get_linestyle(), line.get_linewidth()) for line in curves}) == len(curves) >= 2
    for axes in draw(run(60), {1: run(60)}).axes:
        curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 60 and line.get_linestyle() == "-"]
        assert len({line.get_marker() for line in curves}) == len(curves) == 2
