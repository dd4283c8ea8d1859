"""State machine of `yolov12 watch`: pure functions of a state and of facts. The clock is one of the facts.

An attempt goes through these phases. Every action may be repeated, so a watch that is killed anywhere goes on from the
phase in its state file.

IDLE -> PREPARING -> TRAINING -> JUDGING -> PROMOTING -> EXPORTING -> REPORTING -> IDLE
                        |           |          |                         ^
                        +-----------+----------+-------------------------+   failed, not promoted, or superseded

An attempt that came to no result has not used its images: they begin another one, after a pause. If the export of a
model that serves has failed, IDLE -> EXPORTING_LATE -> IDLE repeats it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from yolov12.watch.phases import Action, Facts, Kind, Outcome, Phase, Rules, State

__all__ = ["begin", "decide", "ended", "export_again", "is_inconclusive", "judged", "lost", "prepared", "promoted"]
__all__ += ["started"]

_FIRST_RETRY_S, _LONGEST_RETRY_S = 30.0, 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 3600.0, 24 * 3600.0
"""Seconds between an attempt that came to no result and the next."""
_EXPORT_PAUSE_S = 3600.0
_FULL = re.compile(r"\[Errno (28|122)\]")  # ENOSPC and EDQUOT: also inodes, a quota, shared memory
_REFUSED = 2  # exit status of a command that another attempt would end in the same way


def decide(state: State, facts: Facts, rules: Rules) -> Action:
    """Return what to do next.

    Args:
        state: The current state.
        facts: Facts at this moment.
        rules: Settings of the watch.
    """
    if state.phase is Phase.IDLE:
        if state.unexported and not _is_early(state.export_at, facts.now, _EXPORT_PAUSE_S):
            return Action(Kind.EXPORT)
        reason = "" if _is_early(state.retry_at, facts.now, _LONGEST_PAUSE_S) else _due(state, facts, rules)
        if not reason:
            return Action(Kind.WAIT)
        return Action(Kind.BEGIN, reason) if facts.has_room else Action(Kind.WAIT_FOR_ROOM)
    if state.phase is Phase.PREPARING:
        return Action(Kind.PREPARE)
    if state.phase is Phase.PROMOTING:
        return Action(Kind.PROMOTE)
    if facts.is_running or _is_early(state.retry_at, facts.now, _LONGEST_RETRY_S):
        return Action(Kind.WAIT_FOR_WORK)
    if state.phase is Phase.TRAINING and not facts.has_room:
        return Action(Kind.WAIT_FOR_ROOM)
    return Action(Kind.START)


def _is_early(at: float, now: float, longest_s: float) -> bool:
    """Return whether a time has not come. A clock that was set back must not delay anything for ever."""
    return now < at <= now + longest_s


def started(state: State) -> State:
    """Return the state when a watch starts: whoever has started it may have mended something, so nothing is early.

    Args:
        state: The state of the watch before.
    """
    return replace(state, retry_at=0.0, export_at=0.0) if state.phase is Phase.IDLE else state


def _due(state: State, facts: Facts, rules: Rules) -> str:
    """Return why an attempt is due now; an empty text if none is."""
    if not facts.new_images or not facts.trainable:
        return ""
    # Attempts that common classes begin must not use up the images of a rare new class before it has enough of them.
    too_few = {name: count for name, count in facts.used.items() if count < rules.min_images}
    counts = {name: count + too_few.get(name, 0) for name, count in facts.new.items()}
    name = max(counts, key=lambda each: (counts[each], each), default=None)
    if name is not None and counts[name] >= rules.min_images:
        if counts[name] > facts.new[name]:
            return f"{counts[name]} images of the new class '{name}'"
        return f"{counts[name]} new images of '{name}'"
    elapsed = facts.now - state.started
    if rules.every_s is not None and not 0 <= elapsed < rules.every_s:  # also after a clock was set back
        return f"{facts.new_images} new images on schedule"
    return ""


def begin(state: State, reason: str, now: float, stamp: str) -> State:
    """Return the state after an attempt was begun.

    Args:
        state: A state in the phase IDLE.
        reason: Why it begins.
        now: Seconds since 1970.
        stamp: Date and time as text, for the name of its folder.
    """
    number = state.number + 1
    return replace(
        state,
        phase=Phase.PREPARING,
        number=number,
        attempt=f"{number:04d}-{stamp}",
        started=now,
        previous=state.started,
        reason=reason,
        failures=0,
        retry_at=0.0,
        outcome=Outcome.OPEN,
        detail="",
        progress=0,
    )


def prepared(state: State) -> State:
    """Return the state after the images of an attempt were fixed."""
    return _phase(state, Phase.TRAINING)


def ended(state: State, status: int, facts: Facts, rules: Rules, message: str = "") -> State:
    """Return the state after the process of this phase has ended.

    Args:
        state: A state in one of `CHILD_PHASES`.
        status: Exit status of the process; negative for a signal. For a successful JUDGING, `judged` follows instead.
        facts: Facts at this moment.
        rules: Settings of the watch.
        message: Last error of the process.
    """
    if status == 0:
        if state.phase in (Phase.EXPORTING, Phase.EXPORTING_LATE):
            state = replace(state, unexported="")
        return _over(state, facts.now) if state.phase is Phase.REPORTING else _next(state, rules)
    if not facts.has_room or _FULL.search(message):  # no failure of the attempt: it goes on when there is room
        return replace(state, retry_at=facts.now + (_LONGEST_RETRY_S if facts.has_room else _FIRST_RETRY_S))
    if state.phase is Phase.EXPORTING_LATE:
        return _phase(replace(state, export_at=facts.now + _EXPORT_PAUSE_S), Phase.IDLE)
    failures = state.failures if facts.progress <= state.progress else 0
    # What could be used before may come back: after a power loss, a GPU may come later than the watch.
    may_come_back = facts.has_saved and state.phase in (Phase.TRAINING, Phase.JUDGING)
    if (status == _REFUSED and not may_come_back) or failures >= rules.restarts:
        return _given_up(state, status, facts.now, failures + 1, message)
    pause = min(_FIRST_RETRY_S * 2**failures, _LONGEST_RETRY_S)
    progress = max(facts.progress, state.progress)
    return replace(state, failures=failures + 1, progress=progress, retry_at=facts.now + pause)


def _given_up(state: State, status: int, now: float, tries: int, message: str) -> State:
    if state.phase is Phase.REPORTING:
        return _over(state, now)
    what = {Phase.TRAINING: "training", Phase.JUDGING: "comparison", Phase.EXPORTING: "export"}
    tried = f" after {tries} tries" if tries > 1 else ""
    detail = f"the {what[state.phase]} failed{tried} with status {status}: {message or 'no message'}"
    state = replace(state, detail=detail)
    if state.phase is Phase.EXPORTING:
        state = replace(state, unexported=state.attempt, export_at=now + _EXPORT_PAUSE_S)
    else:
        state = replace(state, outcome=Outcome.FAILED)
    return _phase(state, Phase.REPORTING)


def is_inconclusive(state: State) -> bool:
    """Return whether an attempt that is over has told nothing about its images.

    It has failed, or the serving model was replaced meanwhile.

    Args:
        state: A state in the phase IDLE, after an attempt.
    """
    return state.outcome is Outcome.FAILED or (state.outcome is Outcome.NOT_PROMOTED and bool(state.detail))


def _over(state: State, now: float) -> State:
    """Return the state after the report of an attempt."""
    state = _phase(state, Phase.IDLE)
    if not is_inconclusive(state):
        return replace(state, setbacks=0)
    pause_s = min(_FIRST_PAUSE_S * 2**state.setbacks, _LONGEST_PAUSE_S)
    return replace(state, setbacks=state.setbacks + 1, retry_at=now + pause_s)


def lost(state: State) -> State:
    """Return the state after somebody has removed the folder of an attempt, or a file that it needs.

    Args:
        state: A state in a phase after PREPARING.
    """
    if state.phase is Phase.EXPORTING_LATE:
        state = replace(state, unexported="")
    is_over = state.phase in (Phase.EXPORTING, Phase.REPORTING, Phase.EXPORTING_LATE)
    return _phase(state, Phase.IDLE if is_over else Phase.PREPARING)


def judged(state: State, *, promote: bool) -> State:
    """Return the state after the candidate was compared with the serving model.

    Args:
        state: A state in the phase JUDGING.
        promote: True if the candidate is to serve.
    """
    if promote:
        return _phase(state, Phase.PROMOTING)
    return _phase(replace(state, outcome=Outcome.NOT_PROMOTED), Phase.REPORTING)


def promoted(state: State, rules: Rules, *, obstacle: str = "") -> State:
    """Return the state after a promotion.

    Args:
        state: A state in the phase PROMOTING.
        rules: Settings of the watch.
        obstacle: Why the candidate was not promoted after all; empty if it serves now.
    """
    if obstacle:
        return _phase(replace(state, outcome=Outcome.NOT_PROMOTED, detail=obstacle), Phase.REPORTING)
    return _next(replace(state, outcome=Outcome.PROMOTED, unexported=""), rules)


def export_again(state: State, *, serves: bool) -> State:
    """Return the state in which the export that has failed is tried again.

    Args:
        state: A state in the phase IDLE.
        serves: True if the model that could not be exported still serves, and is still to be exported.
    """
    return _phase(state, Phase.EXPORTING_LATE) if serves else replace(state, unexported="")


def _next(state: State, rules: Rules) -> State:
    order = list(Phase)
    following = order[(order.index(state.phase) + 1) % len(order)]  # the first after the last
    if following is Phase.EXPORTING and not rules.exports:
        following = Phase.REPORTING
    return _phase(state, following)


def _phase(state: State, phase: Phase) -> State:
    return replace(state, phase=phase, failures=0, retry_at=0.0)
