"""State machine of `yolov12 watch`: pure functions of a state and of facts. The clock is one of the facts.

An attempt goes through these phases. Every action may be repeated, so a watch that is killed anywhere goes on from the
phase in its state file.

IDLE -> PREPARING -> TRAINING -> JUDGING -> PROMOTING -> EXPORTING -> REPORTING -> IDLE
                        |           |          |                         ^
                        +-----------+----------+-------------------------+   failed, not promoted, or superseded
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path

from yolov12.errors import DataError
from yolov12.watch.damage import has_content
from yolov12.watch.moves import save_text

__all__ = [
    "FILES",
    "SPEC",
    "Action",
    "Facts",
    "Kind",
    "Outcome",
    "Phase",
    "Rules",
    "State",
    "begin",
    "decide",
    "ended",
    "judged",
    "load",
    "lost",
    "prepared",
    "promoted",
    "save",
]

_VERSION = 1
_FIRST_RETRY_S, _LONGEST_RETRY_S = 30.0, 600.0
_REFUSED = 2  # exit status of a command that another attempt would end in the same way


class Phase(str, Enum):
    """Phase of the current attempt."""

    IDLE = "idle"
    PREPARING = "preparing"
    TRAINING = "training"
    JUDGING = "judging"
    PROMOTING = "promoting"
    EXPORTING = "exporting"
    REPORTING = "reporting"


class Outcome(str, Enum):
    """Outcome of an attempt."""

    OPEN = "open"
    PROMOTED = "promoted"
    NOT_PROMOTED = "not promoted"
    FAILED = "failed"


SPEC = "attempt.json"
"""Name of the file in the folder of an attempt that says all that its processes need."""
_DATA = ("data.yaml", "train.txt", "val.txt")
FILES: Mapping[Phase, tuple[str, ...]] = {
    Phase.TRAINING: (SPEC, "before.pt", *_DATA),
    Phase.JUDGING: (SPEC, "before.pt", *_DATA, "candidate.pt"),
    Phase.PROMOTING: (SPEC, "before.pt", "candidate.pt", "verdict.json"),
    Phase.EXPORTING: (SPEC,),
    Phase.REPORTING: (SPEC,),
}
"""Names of the files in the folder of an attempt without which a phase cannot go on."""
CHILD_PHASES = (Phase.TRAINING, Phase.JUDGING, Phase.EXPORTING, Phase.REPORTING)
"""Phases whose work is done in a process of its own."""


@dataclass(frozen=True)
class State:
    """Content of the state file."""

    phase: Phase = Phase.IDLE
    number: int = 0
    """Number of the current attempt, or of the last one if the phase is IDLE. The first is 1."""
    attempt: str = ""
    """Name of its folder in `history/`; empty before the first."""
    started: float = 0.0
    """Time at which it started, or before the first attempt the first start of the watch, in seconds since 1970."""
    previous: float = 0.0
    """`started` of the attempt before."""
    reason: str = ""
    """Why it was started."""
    failures: int = 0
    """Number of times that the work of this phase has failed."""
    retry_at: float = 0.0
    """Time before which the work of this phase does not start again."""
    outcome: Outcome = Outcome.OPEN
    detail: str = ""
    """Why the attempt failed, or what went wrong after it."""


@dataclass(frozen=True)
class Rules:
    """Settings that decide when something happens."""

    min_images: int = 20
    every_s: float | None = None
    restarts: int = 5
    """Number of times that a training or another process of an attempt is started again after a failure."""
    exports: bool = False


@dataclass(frozen=True)
class Facts:
    """What a decision depends on, besides the state."""

    now: float
    """Seconds since 1970."""
    new: Mapping[str, int]
    """Class → number of images with it that no attempt has used yet."""
    new_images: int = 0
    """Number of images that no attempt has used yet."""
    used: Mapping[str, int] = field(default_factory=dict)
    """Class that the line's data set does not have → number of images with it that attempts have used."""
    trainable: bool = True
    """True if there are images for training and for validation."""
    is_running: bool = False
    """True if the process of this phase runs."""
    has_saved: bool = False
    """True if the training of this attempt has saved a checkpoint, so its arguments could be used at that time."""
    has_room: bool = True
    """True if the disk has room for an attempt, and the data set is there."""


class Kind(str, Enum):
    """Kind of an action."""

    WAIT = "wait"
    """Nothing is left to do until images arrive or time passes."""
    WAIT_FOR_WORK = "wait for work"
    """A process runs, or starts again later."""
    WAIT_FOR_ROOM = "wait for room"
    """The disk is full, or the data set is not there."""
    BEGIN = "begin"
    PREPARE = "prepare"
    START = "start"
    """Start the process of this phase."""
    PROMOTE = "promote"


@dataclass(frozen=True)
class Action:
    """What to do next."""

    kind: Kind
    reason: str = ""
    """Why an attempt begins."""


def decide(state: State, facts: Facts, rules: Rules) -> Action:
    """Return what to do next.

    Args:
        state: The current state.
        facts: Facts at this moment.
        rules: Settings of the watch.
    """
    if state.phase is Phase.IDLE:
        reason = _due(state, facts, rules)
        if not reason:
            return Action(Kind.WAIT)
        return Action(Kind.BEGIN, reason) if facts.has_room else Action(Kind.WAIT_FOR_ROOM)
    if state.phase is Phase.PREPARING:
        return Action(Kind.PREPARE)
    if state.phase is Phase.PROMOTING:
        return Action(Kind.PROMOTE)
    # A clock that was set back must not delay a retry for ever.
    if facts.is_running or facts.now < state.retry_at <= facts.now + _LONGEST_RETRY_S:
        return Action(Kind.WAIT_FOR_WORK)
    if state.phase is Phase.TRAINING and not facts.has_room:
        return Action(Kind.WAIT_FOR_ROOM)
    return Action(Kind.START)


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
    return State(Phase.PREPARING, number, f"{number:04d}-{stamp}", now, state.started, reason)


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
        return _next(state, rules)
    if not facts.has_room:  # a full or missing disk is no failure of the attempt: it goes on afterwards
        return replace(state, retry_at=facts.now + _FIRST_RETRY_S)
    # What could be used before may come back: after a power loss, a GPU may come later than the watch.
    may_come_back = facts.has_saved and state.phase in (Phase.TRAINING, Phase.JUDGING)
    if (status == _REFUSED and not may_come_back) or state.failures >= rules.restarts:
        what = {Phase.TRAINING: "training", Phase.JUDGING: "comparison", Phase.EXPORTING: "export"}
        if state.phase is Phase.REPORTING:
            return _next(state, rules)
        tried = f" after {state.failures + 1} tries" if state.failures else ""
        detail = f"the {what[state.phase]} failed{tried} with status {status}: {message or 'no message'}"
        outcome = state.outcome if state.phase is Phase.EXPORTING else Outcome.FAILED
        return _phase(replace(state, outcome=outcome, detail=detail), Phase.REPORTING)
    pause = min(_FIRST_RETRY_S * 2**state.failures, _LONGEST_RETRY_S)
    return replace(state, failures=state.failures + 1, retry_at=facts.now + pause)


def lost(state: State) -> State:
    """Return the state after somebody has removed the folder of an attempt, or a file that it needs.

    Args:
        state: A state in a phase after PREPARING.
    """
    is_over = state.phase in (Phase.EXPORTING, Phase.REPORTING)
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
    return _next(replace(state, outcome=Outcome.PROMOTED), rules)


def _next(state: State, rules: Rules) -> State:
    order = list(Phase)
    following = order[(order.index(state.phase) + 1) % len(order)]
    if following is Phase.EXPORTING and not rules.exports:
        following = Phase.REPORTING
    return _phase(state, following)


def _phase(state: State, phase: Phase) -> State:
    return replace(state, phase=phase, failures=0, retry_at=0.0)


def save(file: Path, state: State) -> None:
    """Write the state file in one step.

    Args:
        file: The file.
        state: The state.
    """
    save_text(file, json.dumps({"version": _VERSION, **asdict(state)}, indent=1) + "\n")


def load(file: Path) -> State | None:
    """Read the state file.

    Args:
        file: The file.

    Returns:
        The state; None if there is no such file yet, or a power loss has left it without content.

    Raises:
        DataError: The file is damaged, or another version wrote it.
    """
    if not has_content(file):
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
        if found.pop("version") != _VERSION:
            raise ValueError("another version wrote it")
        return State(**{**found, "phase": Phase(found["phase"]), "outcome": Outcome(found["outcome"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}). Move it away: the watch then starts anew with all collected images"
        ) from error
