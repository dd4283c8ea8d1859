"""The state machine: what follows from which facts, without time passing and without files."""

from dataclasses import replace

import pytest

from yolov12.errors import DataError
from yolov12.watch import states
from yolov12.watch.states import CHILD_PHASES, Facts, Kind, Outcome, Phase, Rules, State

NOW = 1_000_000.0
RULES = Rules(min_images=20, every_s=3600.0, restarts=2)
IDLE = State(started=NOW)


def facts(now=NOW, new=None, **changes):
    new = {} if new is None else new
    return Facts(now, new, **{"new_images": sum(new.values()), **changes})


@pytest.mark.parametrize(
    ("new", "seconds", "begins"),
    [
        ({}, 0, ""),
        ({}, 3600, ""),
        ({"crack": 19, "bridge": 19}, 0, ""),
        ({"crack": 20, "bridge": 3}, 0, "20 new images of 'crack'"),
        ({"crack": 1}, 3599, ""),
        ({"crack": 1}, 3600, "1 new images on schedule"),
        ({"crack": 1}, -1, "1 new images on schedule"),  # the clock was set back
    ],
)
def test_an_attempt_begins_with_enough_images_or_on_schedule(new, seconds, begins):
    action = states.decide(IDLE, facts(NOW + seconds, new), RULES)
    assert (action.kind, action.reason) == (Kind.BEGIN if begins else Kind.WAIT, begins)
    without = states.decide(IDLE, facts(NOW + seconds, new, trainable=False), RULES)
    assert without.kind is Kind.WAIT
    never = states.decide(IDLE, facts(NOW + seconds, new), replace(RULES, every_s=None))
    assert (never.kind is Kind.BEGIN) is ("of" in begins)


@pytest.mark.parametrize(
    ("new", "used", "begins"),
    [
        (3, 17, "20 images of the new class 'crack'"),
        (3, 16, ""),
        (20, 0, "20 new images of 'crack'"),
        (19, 20, ""),  # it has had its attempt
        (0, 19, ""),
    ],
)
def test_images_of_a_new_class_count_until_an_attempt_had_enough_of_them(new, used, begins):
    counts = {name: count for name, count in (("crack", new), ("bridge", 1)) if count}
    action = states.decide(IDLE, facts(new=counts, used={"crack": used}), RULES)
    assert (action.kind, action.reason) == (Kind.BEGIN if begins else Kind.WAIT, begins)


def test_an_attempt_whose_folder_is_gone_begins_again_or_is_over():
    phases = {phase: states.lost(State(phase, 3, failures=1)).phase for phase in [*Phase][2:]}
    assert phases == {
        Phase.TRAINING: Phase.PREPARING,
        Phase.JUDGING: Phase.PREPARING,
        Phase.PROMOTING: Phase.PREPARING,
        Phase.EXPORTING: Phase.IDLE,
        Phase.REPORTING: Phase.IDLE,
    }


def test_an_attempt_that_succeeds_passes_through_every_phase():
    for exports in (True, False):
        rules, state, passed = replace(RULES, exports=exports), states.begin(IDLE, "why", NOW, "20261129"), []
        assert (state.number, state.attempt, state.previous) == (1, "0001-20261129", IDLE.started)
        while state.phase is not Phase.IDLE:
            passed.append(state.phase)
            kind = states.decide(state, facts(), rules).kind
            if state.phase is Phase.PREPARING:
                assert kind is Kind.PREPARE
                state = states.prepared(state)
            elif state.phase is Phase.PROMOTING:
                assert kind is Kind.PROMOTE
                state = states.promoted(state, rules)
            else:
                assert kind is Kind.START
                assert states.decide(state, facts(is_running=True), rules).kind is Kind.WAIT_FOR_WORK
                judged = state.phase is Phase.JUDGING
                state = states.judged(state, promote=True) if judged else states.ended(state, 0, facts(), rules)
        expected = [phase for phase in Phase if phase is not Phase.IDLE]
        assert passed == [phase for phase in expected if exports or phase is not Phase.EXPORTING]
        assert state.outcome is Outcome.PROMOTED
        assert states.begin(state, "", NOW, "x").number == 2


@pytest.mark.parametrize("phase", CHILD_PHASES)
def test_work_that_fails_starts_again_later_and_only_a_few_times(phase):
    state, now, pauses = State(phase, 3, outcome=Outcome.PROMOTED), NOW, []
    while state.phase is phase:
        assert states.decide(state, facts(now), RULES).kind is Kind.START
        state = states.ended(state, -9, facts(now), RULES, "killed")
        if state.phase is phase:
            assert states.decide(state, facts(now + 1), RULES).kind is Kind.WAIT_FOR_WORK
            pauses.append(state.retry_at - now)
            now = state.retry_at
    assert pauses == [30, 60]
    if phase is Phase.REPORTING:
        assert state.phase is Phase.IDLE
        return
    assert state.phase is Phase.REPORTING
    assert "failed after 3 tries with status -9: killed" in state.detail
    assert state.outcome is (Outcome.PROMOTED if phase is Phase.EXPORTING else Outcome.FAILED)


def test_what_another_attempt_would_meet_again_is_given_up_at_once():
    state = states.ended(State(Phase.TRAINING, 1), 2, facts(), RULES, "unknown argument")
    assert (state.phase, state.outcome) == (Phase.REPORTING, Outcome.FAILED)
    assert state.detail == "the training failed with status 2: unknown argument"


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.JUDGING])
def test_a_training_that_has_begun_is_not_given_up_because_the_gpu_comes_later(phase):
    state = State(phase, 1)
    for _ in range(RULES.restarts):
        state = states.ended(state, 2, replace(facts(), has_saved=True), RULES, "no GPU is visible")
        assert state.phase is phase
    state = states.ended(state, 2, replace(facts(), has_saved=True), RULES, "no GPU is visible")
    assert (state.phase, state.outcome) == (Phase.REPORTING, Outcome.FAILED)


def test_a_clock_that_is_set_back_does_not_delay_a_retry_for_ever():
    state = replace(State(Phase.TRAINING, 1), retry_at=NOW + 30)
    assert states.decide(state, facts(NOW), RULES).kind is Kind.WAIT_FOR_WORK
    assert states.decide(state, facts(NOW - 86400), RULES).kind is Kind.START


def test_a_full_disk_delays_an_attempt_and_is_no_failure_of_it():
    full = facts(new={"crack": 20}, has_room=False)
    assert states.decide(IDLE, full, RULES).kind is Kind.WAIT_FOR_ROOM
    training = State(Phase.TRAINING, 1, failures=RULES.restarts)
    assert states.decide(training, full, RULES).kind is Kind.WAIT_FOR_ROOM
    after = states.ended(training, 1, full, RULES, "no space left")
    assert (after.phase, after.failures) == (Phase.TRAINING, training.failures)


def test_a_candidate_that_is_not_better_or_came_too_late_is_not_promoted():
    worse = states.judged(State(Phase.JUDGING, 1), promote=False)
    assert (worse.phase, worse.outcome) == (Phase.REPORTING, Outcome.NOT_PROMOTED)
    late = states.promoted(State(Phase.PROMOTING, 1), RULES, obstacle="it was replaced")
    assert (late.phase, late.outcome, late.detail) == (Phase.REPORTING, Outcome.NOT_PROMOTED, "it was replaced")


def test_the_state_file_says_what_it_was_given_and_refuses_damage(tmp_path):
    file = tmp_path / "state.json"
    assert states.load(file) is None
    state = State(Phase.JUDGING, 7, "0007-x", 2.5, 1.5, "why", 1, 9.0, Outcome.FAILED, "detail")
    states.save(file, state)
    assert states.load(file) == state
    for blank in ("", "\n", "\0" * 4096):  # what a power loss may leave
        file.write_text(blank)
        assert states.load(file) is None
    for text in ("{", "{}", '{"version": 2}', '{"version": 1, "phase": "flying", "outcome": "open"}'):
        file.write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            states.load(file)
