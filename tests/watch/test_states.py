"""The state machine: what follows from which facts, without time passing and without files."""

from dataclasses import replace

import pytest

from yolov12.errors import DataError
from yolov12.watch import state_file, states
from yolov12.watch.phases import CHILD_PHASES, Facts, Kind, Outcome, Phase, Rules, State

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
        Phase.EXPORTING_LATE: Phase.IDLE,
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
        expected = [phase for phase in Phase if phase not in (Phase.IDLE, Phase.EXPORTING_LATE)]
        assert passed == [phase for phase in expected if exports or phase is not Phase.EXPORTING]
        assert state.outcome is Outcome.PROMOTED
        assert states.begin(state, "", NOW, "x").number == 2


@pytest.mark.parametrize("phase", [phase for phase in CHILD_PHASES if phase is not Phase.EXPORTING_LATE])
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


def test_a_training_that_gets_on_between_its_failures_is_not_given_up():
    state = State(Phase.TRAINING, 1)
    for progress in range(1, 20):
        state = states.ended(state, -9, facts(progress=progress), RULES, "killed")
        assert (state.phase, state.failures) == (Phase.TRAINING, 1)
    for progress, failures in ((19, 2), (18, 3)):  # a kill loses the latest rows
        assert state.failures == failures - 1
        state = states.ended(state, -9, facts(progress=progress), RULES, "killed")
    assert "failed after 3 tries" in state.detail


def pauses_between(outcome, attempts, detail="", export=""):
    """Return the seconds until an attempt may begin, each time after one with an outcome."""
    state, now, pauses = IDLE, NOW, []
    enough = {"crack": 20}
    for _ in range(attempts):
        state = replace(states.begin(state, "why", now, "x"), phase=Phase.REPORTING, outcome=outcome, detail=detail)
        state = states.ended(replace(state, unexported=export), 0, facts(now), RULES)
        begun = now
        while states.decide(state, facts(now, enough), RULES).kind is not Kind.BEGIN:
            now += 600
        pauses.append(now - begun)
    return pauses


def test_an_attempt_without_a_result_is_followed_by_another_after_longer_and_longer():
    hour = 3600
    expected = [hour, 2 * hour, 4 * hour, 8 * hour, 16 * hour, 24 * hour, 24 * hour]
    assert pauses_between(Outcome.FAILED, 7) == expected
    assert pauses_between(Outcome.NOT_PROMOTED, 3, "it was replaced by somebody else") == expected[:3]
    assert pauses_between(Outcome.NOT_PROMOTED, 3) == pauses_between(Outcome.PROMOTED, 3) == [0, 0, 0]


def test_nothing_is_early_when_a_watch_starts_or_the_clock_was_set_back():
    state = replace(IDLE, retry_at=NOW + 3600, export_at=NOW + 3600, unexported="0001-x")
    enough = {"crack": 20}
    assert states.decide(state, facts(new=enough), RULES).kind is Kind.WAIT
    assert states.decide(states.started(state), facts(new=enough), RULES).kind is Kind.EXPORT
    assert states.decide(replace(state, unexported=""), facts(NOW - 90_000, enough), RULES).kind is Kind.BEGIN
    training = replace(state, phase=Phase.TRAINING)
    assert states.started(training) == training  # a restart loop must not be a hot one


def test_an_export_that_has_failed_is_tried_again_every_hour_beside_all_attempts():
    failed = State(Phase.EXPORTING, 3, "0003-x", outcome=Outcome.PROMOTED, failures=RULES.restarts)
    state = states.ended(states.ended(failed, 1, facts(), RULES, "full"), 0, facts(), RULES)
    assert (state.phase, state.outcome, state.unexported) == (Phase.IDLE, Outcome.PROMOTED, "0003-x")
    enough = {"crack": 20}
    assert states.decide(state, facts(NOW + 3599), RULES).kind is Kind.WAIT
    assert states.decide(state, facts(NOW + 3599, enough), RULES).kind is Kind.BEGIN  # it keeps none from beginning
    assert states.decide(state, facts(NOW + 3600, enough), RULES).kind is Kind.EXPORT
    late = states.export_again(state, serves=True)
    assert states.decide(late, facts(), RULES).kind is Kind.START
    again = states.ended(late, 1, facts(NOW + 3600), RULES, "no")
    assert (again.phase, again.unexported, again.export_at) == (Phase.IDLE, "0003-x", NOW + 7200)
    assert states.ended(late, 0, facts(), RULES) == replace(late, phase=Phase.IDLE, unexported="")
    assert states.export_again(state, serves=False).unexported == ""
    begun = states.begin(state, "why", NOW, "y")
    assert begun.unexported == "0003-x"
    assert states.promoted(replace(begun, phase=Phase.PROMOTING), RULES).unexported == ""


@pytest.mark.parametrize("number", [28, 122])
def test_what_a_full_disk_ends_is_no_failure_though_there_are_free_bytes(number):
    """Inodes, a quota or shared memory may be used up."""
    training = State(Phase.TRAINING, 1, failures=RULES.restarts)
    after = states.ended(training, 1, facts(), RULES, f"[Errno {number}] it is full")
    assert (after.phase, after.failures, after.retry_at) == (Phase.TRAINING, training.failures, NOW + 600)


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
    assert state_file.load(file) is None
    state = State(Phase.JUDGING, 7, "0007-x", 2.5, 1.5, "why", 1, 9.0, Outcome.FAILED, "detail")
    state_file.save(file, state)
    assert state_file.load(file) == state
    for blank in ("", "\n", "\0" * 4096):  # what a power loss may leave
        file.write_text(blank)
        assert state_file.load(file) is None
    for text in ("{", "{}", '{"version": 2}', '{"version": 1, "phase": "flying", "outcome": "open"}'):
        file.write_text(text)
        with pytest.raises(DataError, match="cannot be read"):
            state_file.load(file)
