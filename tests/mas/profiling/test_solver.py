"""The solver's plan is the fastest of all possible plans."""

import itertools
import threading

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.profiling import solver
from yolov12.mas.profiling.profile import LayerCost, Profile, Time
from yolov12.mas.profiling.solver import ladder, peak_bytes, solve


@st.composite
def profiles(draw):
    """Draw a profile of two to four stages, the first with two layers inside: at most 3^6 plans."""
    number = st.integers(1, 50)
    layers = []
    for stage in range(draw(st.integers(2, 4))):
        inner = [draw(number) for _ in range(2)] if stage == 0 else []
        kept = sum(inner) + draw(number)
        for name, inside, size in [(f"{stage}", None, kept), *((f"0.{i}", "0", size) for i, size in enumerate(inner))]:
            rebuilt = size * draw(st.sampled_from([0.0, 0.3, 0.6]))
            layers.append(
                LayerCost(
                    name=name,
                    inside=inside,
                    stage=stage,
                    kept_bytes=size,
                    recompute_frees_bytes=size * draw(st.sampled_from([0.5, 0.8, 1.0])),
                    rebuild_frees_bytes=rebuilt,
                    result_bytes=(result := rebuilt * draw(st.sampled_from([0.0, 0.5]))),
                    held_bytes=result + (rebuilt - result) * draw(st.sampled_from([0.0, 0.5])),
                    largest_rebuilt_bytes=rebuilt * draw(st.sampled_from([0.3, 1.0])),
                    recompute=Time(draw(number), draw(number)),
                    rebuild=Time(draw(number) / 4, draw(number) / 4),
                )
            )
    stages = 1 + max(layer.stage for layer in layers)
    extra = tuple(draw(number) for _ in range(stages))
    return Profile(tuple(layers), draw(number), draw(number), extra, Time(100.0, 80.0))


def all_plans(profile):
    names = [layer.name for layer in profile.layers]
    for modes in itertools.product((None, REBUILD, RECOMPUTE), repeat=len(names)):
        chosen = {name: mode for name, mode in zip(names, modes, strict=True) if mode}
        if not ("0" in chosen and {"0.0", "0.1"} & set(chosen)):
            yield Plan(tuple(chosen.items()))


def slow(profile, plan):
    by_name = {layer.name: layer for layer in profile.layers}
    times = [by_name[n].recompute if mode == RECOMPUTE else by_name[n].rebuild for n, mode in plan.modes]
    return 1 + sum(time.host_ms / 100 + time.device_ms / 80 for time in times) / 2


def highest_phase(profile, plan):
    """Compute the peak independently of the solver, by going through the passes."""
    modes = dict(plan.modes)
    left, again, held_longer, result = {}, {}, 0, 0
    for layer in profile.layers:
        freed = {REBUILD: layer.rebuild_frees_bytes, RECOMPUTE: layer.recompute_frees_bytes}.get(
            modes.get(layer.name), 0
        )
        left[layer.stage] = left.get(layer.stage, 0) + (layer.kept_bytes if layer.inside is None else 0) - freed
        if modes.get(layer.name) == REBUILD:
            held_longer, result = held_longer + layer.held_bytes, result + layer.result_bytes
            freed = layer.largest_rebuilt_bytes
        if modes.get(layer.name):
            again[layer.stage] = max(again.get(layer.stage, 0), freed)
    held = sum(left.values())
    highest = held + max(profile.forward_extra_bytes + held_longer, profile.loss_extra_bytes + result)
    for stage in sorted(left, reverse=True):
        highest = max(highest, held + again.get(stage, 0) + profile.stage_extra_bytes[stage])
        held -= left[stage]
    return highest


@given(profiles(), st.floats(0.2, 1.0))
def test_solution_is_the_best_of_all_plans(profile, share):
    most = share * peak_bytes(profile, KEEP_ALL)
    fitting = [plan for plan in all_plans(profile) if highest_phase(profile, plan) <= most * (1 + 1e-9)]
    found = solve(profile, most)
    if found is None:
        # A difference within the solver's tolerance is allowed.
        assert all(highest_phase(profile, plan) > most * (1 - 1e-6) for plan in fitting)
        return
    assert found.peak_bytes == pytest.approx(highest_phase(profile, found.plan))
    assert found.peak_bytes <= most * (1 + 1e-5)
    assert found.slow == pytest.approx(slow(profile, found.plan))
    if fitting:
        assert found.slow <= min(slow(profile, plan) for plan in fitting) + 1e-6


@settings(max_examples=settings.default.max_examples // 5)
@given(profiles())
def test_ladder_goes_down_to_the_lowest_peak_there_is(profile):
    levels = ladder(profile)
    assert levels[0].plan == KEEP_ALL
    assert all(b.peak_bytes < a.peak_bytes for a, b in itertools.pairwise(levels))
    assert all(b.slow >= a.slow for a, b in itertools.pairwise(levels))
    lowest = min(highest_phase(profile, plan) for plan in all_plans(profile))
    # Levels within 1 % of the one before are left out.
    assert levels[-1].peak_bytes <= lowest / 0.99 * (1 + 1e-6) or levels[-1].peak_bytes == pytest.approx(
        lowest, rel=0.011
    )


@settings(max_examples=settings.default.max_examples // 5)
@given(profiles())
def test_ladder_is_what_its_levels_are_one_by_one(profile):
    levels, lowest = ladder(profile), solver._Programme(profile).lowest_peak()
    found = [levels[0]]
    for step in range(1, solver.LEVELS + 1):
        most = levels[0].peak_bytes * (lowest / levels[0].peak_bytes) ** (step / solver.LEVELS)
        level = solve(profile, most * (1 + 1e-9))
        if level is not None and level.peak_bytes < 0.99 * found[-1].peak_bytes:
            found.append(level)
    assert levels == tuple(found)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 2), (5, 1, 5), (64, 1, 10), (8, 4, 2), (2, 4, 1)]
)
def test_ladder_is_solved_on_all_cores_of_the_process(cores, ranks, threads, monkeypatch):
    """Levels wait for one another here, as many as there should be threads."""
    monkeypatch.setattr(solver, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    together, least_time = threading.Barrier(threads), solver._Programme.least_time

    def waiting(programme, most_bytes):
        together.wait(timeout=10)
        return least_time(programme, most_bytes)

    layer = LayerCost("0", None, 0, 100.0, 80.0, 30.0, 0.0, 0.0, 10.0, Time(3.0, 3.0), Time(1.0, 1.0))
    profile = Profile((layer,), 5.0, 5.0, (20.0,), Time(10.0, 10.0))
    levels = ladder(profile)
    monkeypatch.setattr(solver._Programme, "least_time", waiting)
    assert ladder(profile) == levels
    assert solver._threads(solver.LEVELS) == threads


def test_nothing_to_choose():
    layer = LayerCost("0", None, 0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0, Time(1.0, 1.0), Time(0.0, 0.0))
    profile = Profile((layer,), 5.0, 5.0, (10.0,), Time(10.0, 10.0))
    assert [level.plan for level in ladder(profile)] == [KEEP_ALL]
    assert solve(profile, 100.0) is None
    assert solve(profile, 110.0).plan == KEEP_ALL


@pytest.mark.parametrize("also_without_presolve", [False, True])
def test_plans_when_the_solver_fails(also_without_presolve, monkeypatch):
    """HiGHS ends with "Solve error" for a few ladders in a hundred, which says nothing about the plans there are."""
    first = LayerCost("0", None, 0, 100.0, 80.0, 30.0, 0.0, 0.0, 10.0, Time(3.0, 3.0), Time(1.0, 1.0))
    second = LayerCost("1", None, 1, 60.0, 50.0, 20.0, 0.0, 0.0, 10.0, Time(2.0, 2.0), Time(0.5, 0.5))
    profile = Profile((first, second), 5.0, 5.0, (20.0, 40.0), Time(10.0, 10.0))
    limits = 200.0, 195.0, 160.0, 135.0, 90.0
    best = [solve(profile, limit) for limit in limits]
    levels = ladder(profile)
    milp = scipy.optimize.milp

    def failing(*args, options, **kwargs):
        if also_without_presolve or options.get("presolve", True):
            return scipy.optimize.OptimizeResult(x=None, status=4)
        return milp(*args, options=options, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", failing)
    found = [solve(profile, limit) for limit in limits]
    if not also_without_presolve:
        assert found == best
        assert ladder(profile) == levels
        return
    for level, optimum, limit in zip(found, best, limits, strict=True):
        assert (level is None) == (optimum is None)
        assert level is None or (level.peak_bytes <= limit and level.slow >= optimum.slow)
    assert ladder(profile)[-1].peak_bytes == levels[-1].peak_bytes < levels[0].peak_bytes
