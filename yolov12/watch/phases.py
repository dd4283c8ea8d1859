"""What the state machine of `yolov12 watch` works with: phases, the state, facts, and actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["CHILD_PHASES", "FILES", "SPEC", "Action", "Facts", "Kind", "Outcome", "Phase", "Rules", "State"]


class Phase(str, Enum):
    """Phase of the current attempt."""

    IDLE = "idle"
    PREPARING = "preparing"
    TRAINING = "training"
    JUDGING = "judging"
    PROMOTING = "promoting"
    EXPORTING = "exporting"
    REPORTING = "reporting"
    EXPORTING_LATE = "exporting late"


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
    Phase.EXPORTING_LATE: (SPEC, "candidate.pt"),
}
"""Names of the files in the folder of an attempt without which a phase cannot go on."""
CHILD_PHASES = (Phase.TRAINING, Phase.JUDGING, Phase.EXPORTING, Phase.REPORTING, Phase.EXPORTING_LATE)
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
    """Number of times that the work of this phase has failed without progress."""
    retry_at: float = 0.0
    """Time before which the work of this phase does not start again, or if the phase is IDLE, no attempt begins."""
    outcome: Outcome = Outcome.OPEN
    detail: str = ""
    """Why the attempt failed, or what went wrong after it."""
    progress: int = 0
    """`Facts.progress` when the training had failed last."""
    setbacks: int = 0
    """Number of attempts without a result, one after the other."""
    unexported: str = ""
    """Name of the attempt whose candidate serves and could not be exported; empty if there is none."""
    export_at: float = 0.0
    """Time before which this export does not start again."""


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
    progress: int = 0
    """How far the training of this attempt has come: a number that only grows."""
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
    EXPORT = "export"
    """Try the export of the serving model again, which has failed."""


@dataclass(frozen=True)
class Action:
    """What to do next."""

    kind: Kind
    reason: str = ""
    """Why an attempt begins."""
