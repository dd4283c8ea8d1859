"""The line that says how a batch ran that did not fit: what it claims, and when it claims nothing."""

import pytest

from yolov12.mas.journal.explanation import explain

EVENT = "batch of 64 did not fit"
EXACT = {"is_exact": True, "bn_group": 16}


def row(sizes, *events, step=1, plan="", budget=1106):
    return {
        "step": str(step),
        "micro_batches": sizes,
        "plan": plan,
        "budget_mib": f"{budget:.1f}",
        "events": "; ".join(events),
    }


FOURS = "16 16 16 16"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([row(FOURS, EVENT), row(FOURS)], ": ran as 4 × 16, the same gradient (BatchNorm in groups of 16)"),
        (
            [row("32 32", EVENT, plan="recompute head"), row("16 48", plan="rebuild backbone.0")],
            ": ran as 2 parts of 16 to 48 images with layers recomputed, the same gradient (BatchNorm in groups of 16)",
        ),
        (
            [row("64", EVENT, plan="recompute head")],
            ": ran at once with layers recomputed, the same gradient (BatchNorm in groups of 16)",
        ),
        (
            [row("64"), row("32 32", EVENT), row("64")],
            " in 1 of 3 batches: ran as 2 × 32, the same gradient (BatchNorm in groups of 16)",
        ),
        # Three batches before one update, and the smaller last batch of an epoch.
        (
            [row(" ".join([FOURS] * 3), EVENT), row("16 16")],
            ": ran as 4 × 16, the same gradient (BatchNorm in groups of 16)",
        ),
        (
            [row(FOURS, EVENT), row(" ".join("8" * 8), "groups of 8", step=2)],
            ": ran as 4 to 8 parts of 8 to 16 images, the same gradient but for smaller BatchNorm groups in 1 step",
        ),
        ([row(FOURS, EVENT, "image size 640 to 320")], ": ran as 4 × 16"),
        # The images got smaller with a last batch of an epoch, and stayed so.
        ([row(FOURS, EVENT), row("8", "image size 640 to 320"), row(FOURS)], ": ran as 4 × 16"),
    ],
)
def test_a_batch_that_did_not_fit(rows, line):
    assert explain({0: rows}, **EXACT) == f"batch=64 did not fit into the budget of 1.1 GiB{line}"


@pytest.mark.parametrize("rows", [[], [row("64")], [row(FOURS)], [row(FOURS, "shrunk 64 to 16")]])
def test_nothing_is_said_if_memory_was_not_the_reason(rows):
    assert explain({0: rows}, **EXACT) == ""


@pytest.mark.parametrize("exactness", [{"is_exact": False, "bn_group": 16}, {"is_exact": True, "bn_group": 0}])
def test_the_same_gradient_is_claimed_only_where_it_is_known(exactness):
    assert (
        explain({0: [row(FOURS, EVENT)]}, **exactness)
        == "batch=64 did not fit into the budget of 1.1 GiB: ran as 4 × 16"
    )


def test_budgets_that_changed_are_those_of_the_batches_that_did_not_fit():
    rows = [row(FOURS, EVENT, budget=2048), row("8 " * 8, budget=1024), row("64", budget=9000)]
    assert explain({0: rows}, **EXACT).startswith(
        "batch=64 did not fit into the budget of 1.0 to 2.0 GiB in 2 of 3 batches: ran as 4 to 8 parts of 8 to 16 "
    )


def test_ranks_have_shares():
    journals = {0: [row("16 16 8", "share of 40 did not fit")], 1: [row("24")]}
    assert explain(journals, **EXACT) == (
        "the share of a rank did not fit into the budget of 1.1 GiB in 1 of 2 batches: ran in micro-batches of 16, "
        "the same gradient (BatchNorm in groups of 16)"
    )
    del journals[1]  # on another machine
    assert explain(journals, **EXACT).startswith("the share of a rank did not fit into the budget of 1.1 GiB: ran in ")
