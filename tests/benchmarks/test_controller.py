"""The controller against simulated memory: what it promises, on part of benchmarks/controller's traces."""

import random

import pytest

from benchmarks.controller.rivals import POLICIES
from benchmarks.controller.simulate import CARDS, KINDS, trace
from benchmarks.controller.tournament import compare, summed

AVOIDABLE_PERCENT = 0.1
OF_ORACLE = 0.95


@pytest.fixture(scope="module")
def traces(deep):
    """Number of traces of each of the six seeds."""
    return 50 if deep else 16


@pytest.fixture(scope="module")
def ours(traces):
    return [score for seed in range(6) for score in compare(seed, traces=traces, steps=80, policies=("ours",))]


def test_stays_inside_the_budget_where_it_can(ours, traces):
    total = summed(ours)["all"]
    assert total["traces"] == 6 * traces
    assert total["avoidable_percent"] <= AVOIDABLE_PERCENT
    assert total["died"] == 0


def test_is_nearly_as_fast_as_who_knows_what_will_come(ours):
    assert summed(ours)["all"]["of_oracle"] >= OF_ORACLE


@pytest.mark.parametrize("part", [*KINDS, *(card.name for card in CARDS)])
def test_no_kind_of_memory_and_no_card_makes_it_slow(ours, part):
    """Over 10,000 traces the worst are the fast card, at 0.92, where a new size costs ten batches, and adversaries."""
    assert summed(ours)[part]["of_oracle"] >= 0.90


def test_rivals_are_slower_or_break():
    scores = [score for seed in range(3) for score in compare(seed, traces=12, steps=40)]
    total = {name: summed([score for score in scores if score.policy == name])["all"] for name in POLICIES}
    assert all(total["ours"]["of_oracle"] > total[name]["of_oracle"] for name in POLICIES if name != "ours")
    assert total["fixed"]["died"] > 0
    assert total["halving"]["avoidable_percent"] > 1


def test_nobody_is_faster_than_the_oracle():
    """But for the scatter of times, which is 3 % of a batch and little of many."""
    for score in compare(1, traces=6, steps=40):
        assert score.images / score.ms <= 1.02 * score.steps * CARDS[1].images / score.oracle_ms


def test_repeats():
    assert compare(4, traces=2, steps=20) == compare(4, traces=2, steps=20)


def test_adversary_takes_what_this_process_has_grown_by():
    taker = trace("adversary", 80, random.Random(0))
    assert callable(taker)
    calm = taker(0.4, 0.4)
    taken = taker(0.4, 0.6)
    assert 1 - taken - 0.1 < 0.6  # the budget, as a share of the card
    assert taker(0.6, 0.6) == taken
    assert taker(0.6, 0.3) == calm
