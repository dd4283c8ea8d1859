"""The watch itself: takes images from the inbox, and carries out what the state machine decides.

Nothing is remembered outside of the work folder, and every action may be repeated, so it can be killed anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov12.printable import printable
from yolov12.watch import damage, moves, states
from yolov12.watch.arguments import Request
from yolov12.watch.children import Child, Children, last_error
from yolov12.watch.collection import Collection, digests_in
from yolov12.watch.inbox import Inbox, Pair
from yolov12.watch.log import say
from yolov12.watch.promotion import is_judged, promote
from yolov12.watch.room import obstacle
from yolov12.watch.samples import LARGEST_IMAGE, LARGEST_LABEL, UnusableError, check_image, read, read_label
from yolov12.watch.states import Action, Facts, Kind, Outcome, Phase, State
from yolov12.watch.stuck import Stuck

__all__ = ["Line", "Watch"]

_PAIRS_AT_ONCE = 100  # between two looks at the process of an attempt


@dataclass(frozen=True)
class Line:
    """What the data set and the model say, which the checks at the start have found."""

    data: str
    """Path of the data set yaml."""
    names: Sequence[str]
    """Its class names."""
    task: str
    places: Sequence[str] = ()
    """Files and folders of the data set, without which no training can run."""


class Watch:
    """A watch that has locked its folders.

    Args:
        request: Arguments of the user.
        line: Data set and task.
        children: Starts the processes of attempts.
        clock: Returns the seconds since 1970.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self,
        request: Request,
        line: Line,
        children: Children,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._request, self._line, self._children = request, line, children
        self._clock, self._sleep = clock, sleep
        request.work.mkdir(parents=True, exist_ok=True)
        self.inbox = Inbox(request.inbox, dict(enumerate(line.names)), request.settle_s)
        self._state_file, self._used_file = request.work / "state.json", request.work / "used.txt"
        state = states.load(self._state_file)
        if state is None:  # somebody moved it away, to start anew with all images
            self._used_file.unlink(missing_ok=True)
            state = State(number=damage.last_number(request.work / "history"), started=clock())
        self.state = state
        states.save(self._state_file, self.state)
        for name in (states.SPEC, "verdict.json"):
            damage.drop_damaged(self.attempt / name)
        self.collection = Collection(request.work, line.names, request.val_fraction, digests_in(self._used_file))
        self._child: Child | None = None
        self._is_interrupted = True  # a previous watch may have been killed between two moves
        self._is_complete = True  # False if the inbox has more complete pairs than were taken
        self._stuck = Stuck()
        self._said: set[str] = set()
        self.failed = 0
        """Number of attempts that failed."""

    def run(self) -> int:
        """Watch until a signal, or with `once` until nothing is left to do.

        Returns:
            The exit status.
        """
        try:
            while True:
                kind = self.step()
                if kind is Kind.WAIT and not self._is_complete:
                    continue  # more images are there
                ends = kind is Kind.WAIT_FOR_ROOM or (kind is Kind.WAIT and not self.inbox.waiting)
                if self._request.once and ends:
                    self.inbox.report(self._clock(), is_last=True)
                    return int(kind is Kind.WAIT_FOR_ROOM or self.failed > 0 or bool(self._said))
                if kind in (Kind.WAIT, Kind.WAIT_FOR_WORK, Kind.WAIT_FOR_ROOM):
                    self._sleep(self._request.poll_s)
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process of the current attempt. A training saves its state."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def step(self) -> Kind:
        """Take images, and carry out the next action.

        Returns:
            Kind of the action. WAIT_FOR_ROOM also stands for any other reason why files cannot be written.
        """
        problems: set[str] = set()
        try:
            is_collected = False
            try:
                problems.update(self._collect())
                is_collected = True
            except OSError as error:  # an attempt goes on without its inbox
                self._is_interrupted = True
                problems.add(self._explain(error))
            self._look_at_child()
            self._mend()
            action = states.decide(self.state, self._facts(), self._request.rules)
            if action.kind is Kind.WAIT_FOR_ROOM and (reason := self._obstacle()):
                raise reason
            if action.kind in (Kind.WAIT, Kind.BEGIN) and not is_collected:
                return Kind.WAIT_FOR_ROOM
            if action.kind is Kind.BEGIN and not self._is_complete:
                return Kind.BEGIN
            if action.kind is Kind.PREPARE and self._is_model_changing():
                return Kind.WAIT_FOR_WORK
            self._perform(action)
            return action.kind
        except OSError as error:
            self._is_interrupted = True
            problems.add(self._explain(error))
            return Kind.WAIT_FOR_ROOM
        finally:
            for problem in sorted(problems - self._said):
                say(problem)
            self._said = problems

    # -- images -------------------------------------------------------------------------------------------------------

    def _collect(self) -> list[str]:
        """Take complete pairs out of the inbox, and return what stands in the way of others."""
        stuck = self.collection.recover(self.inbox) if self._is_interrupted else []
        self._is_interrupted = bool(stuck)
        now = self._clock()
        pairs = self.inbox.complete(now, _PAIRS_AT_ONCE + len(self._stuck) + 1)
        self.inbox.report(now)
        self._stuck.keep(pair.image for pair in pairs)
        pairs.sort(key=lambda pair: self._stuck.rank(pair.image, now))  # they must not keep others from being taken
        self._is_complete = all(pair.image in self._stuck for pair in pairs[_PAIRS_AT_ONCE:])
        accepted = Counter[str]()
        due = [pair for pair in pairs[:_PAIRS_AT_ONCE] if not self._stuck.waits(pair.image, now)]
        for pair in due:
            try:
                accepted.update(self._take(pair))
            except (OSError, MemoryError) as error:
                self._is_interrupted = True
                if isinstance(error, OSError) and error.errno in moves.FULL:
                    raise
                if pair.image.exists() and pair.label.exists():
                    why = str(error) or "there is not enough memory to check it"
                    self._stuck.add(pair.image, f"{printable(pair.image.name)} stays in the inbox: {why}", now)
                    continue
            self._stuck.remove(pair.image)
        if count := accepted.pop("", 0):
            objects = ", ".join(f"{name} in {number}" for name, number in sorted(accepted.items()))
            say(f"{count} new images: {objects or 'without objects'}")
        return [*stuck, *self.inbox.problems, *self._stuck.reasons]

    def _take(self, pair: Pair) -> list[str]:
        """Accept a pair or set it aside. Return the names of its classes, and an empty one for the image."""
        digest = aside = ""
        try:
            data = read(pair.image, LARGEST_IMAGE)
            digest = hashlib.sha256(data).hexdigest()
            if same := self.collection.find(digest):
                raise UnusableError(f"the collection has the same image: {same.image}. To correct it, edit its label")
            check_image(data)
            boxes = read_label(read(pair.label, LARGEST_LABEL), pair.names, self._line.task)
        except UnusableError as error:
            aside = str(error)
        if self.inbox.has_changed(pair):  # what was read is not what would be moved
            self.inbox.waiting += 1
            return []
        if aside:
            note = self.collection.set_aside(pair, digest or moves.digest(pair.image), aside)
            say(f"{printable(pair.image.name)} was set aside, see {note}: {aside}")
            return []
        self.collection.accept(pair, digest, boxes)
        return ["", *{box.name for box in boxes}]

    # -- attempts -----------------------------------------------------------------------------------------------------

    @property
    def attempt(self) -> Path:
        """Folder of the current attempt."""
        return self._request.work / "history" / self.state.attempt

    def _facts(self) -> Facts:
        return Facts(
            now=self._clock(),
            new=self.collection.new_by_class(),
            used=self.collection.used_by_new_class(),
            new_images=len(self.collection.new),
            trainable=self.collection.is_trainable,
            is_running=self._child is not None,
            has_saved=(self.attempt / "run" / "weights" / "last.pt").exists(),
            has_room=self._obstacle() is None,
        )

    def _obstacle(self) -> OSError | None:
        return obstacle(self._line.places, self._request.work, self._request.model)

    def _is_model_changing(self) -> bool:
        """Return whether somebody may be writing the serving model."""
        return 0 <= self._clock() - self._request.model.stat().st_mtime < self._request.settle_s

    def _mend(self) -> None:
        """Start the attempt again if somebody has removed its folder, or a file of it is gone or empty."""
        needed = states.FILES.get(self.state.phase, ())
        lost = [self.attempt / name for name in needed if not damage.has_content(self.attempt / name)]
        candidate = self.attempt / "candidate.pt"
        if self.state.phase is Phase.PROMOTING and not lost and not is_judged(candidate, self._verdict()):
            lost = [candidate]
        if not lost:
            return
        self.stop()
        spec = self.attempt / states.SPEC
        what = "a file" if spec.exists() else "the folder"
        say(f"{what} of attempt {self.state.number} is gone: {lost[0]}")
        spec.unlink(missing_ok=True)  # nothing of the attempt counts then
        self._go_to(states.lost(self.state))

    def _perform(self, action: Action) -> None:
        if action.kind is Kind.BEGIN:
            now = self._clock()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
            self._go_to(states.begin(self.state, action.reason, now, stamp))
            say(f"attempt {self.state.number} begins: {action.reason}")
        elif action.kind is Kind.PREPARE:
            self._prepare()
            self._go_to(states.prepared(self.state))
        elif action.kind is Kind.START:
            spec = self._spec()
            if spec["data"] != self._line.data:  # the data set was moved, and this watch was started with its new place
                moves.save_text(self.attempt / states.SPEC, json.dumps({**spec, "data": self._line.data}, indent=1))
            if self.state.phase is Phase.REPORTING:
                state = self.state
                outcome = {"outcome": state.outcome.value, "detail": state.detail, "ended": self._clock()}
                moves.save_text(self.attempt / "outcome.json", json.dumps(outcome))
            self._child = self._children.start(self.state.phase.value, self.attempt, self.attempt / "log.txt")
        elif action.kind is Kind.PROMOTE:
            model = Path(self._spec()["model"])
            why_not = promote(self.attempt / "candidate.pt", model, self.attempt / "before.pt")
            say(why_not or f"attempt {self.state.number} is promoted: {model}")
            self._go_to(states.promoted(self.state, self._request.rules, obstacle=why_not))

    def _prepare(self) -> None:
        """Fix the images of the attempt and the model that it starts from."""
        spec = self.attempt / states.SPEC
        if not damage.has_content(self._request.model):
            raise FileNotFoundError(errno.ENOENT, "the serving model is empty", str(self._request.model))
        if not spec.exists():
            self.attempt.mkdir(parents=True, exist_ok=True)
            for name in ("candidate.pt", "verdict.json"):  # of other images, if somebody has removed attempt.json
                (self.attempt / name).unlink(missing_ok=True)
            shutil.rmtree(self.attempt / "run", ignore_errors=True)
            self.collection.snapshot(self.attempt)
            moves.copy(self._request.model, self.attempt / "before.pt")
            new = sorted(self.collection.new.values(), key=lambda entry: entry.image)
            content = {
                "number": self.state.number,
                "started": self.state.started,
                "reason": self.state.reason,
                "model": str(self._request.model),
                "data": self._line.data,
                "images": len(new),
                "objects": self.collection.objects_by_class(new),
                "set_aside": self.collection.set_aside_since(self.state.previous),
                "new_images": [str(entry.image) for entry in new],
                "margin": self._request.margin,
                "export": self._request.export,
                "training": list(self._request.training),
            }
            moves.save_text(spec, json.dumps(content, indent=1) + "\n")
        used = digests_in(self.attempt / "train.txt") | digests_in(self.attempt / "val.txt")
        everything = sorted(self.collection.used | used)
        moves.save_text(self._used_file, "".join(f"{digest}\n" for digest in everything))
        self.collection.mark_used(used)

    def _look_at_child(self) -> None:
        if self._child is None or (status := self._child.poll()) is None:
            return
        self._child = None
        number, message = self.state.number, last_error(self.attempt / "log.txt") if status else ""
        verdict = self._verdict() if self.state.phase is Phase.JUDGING and not status else None
        if verdict is not None:
            self._go_to(states.judged(self.state, promote=verdict["promote"]))
            say(f"attempt {number}: {' '.join(verdict['reasons'])}")
            return
        status = 1 if self.state.phase is Phase.JUDGING and not status else status
        if status:
            say(f"attempt {number}: {self.state.phase.value} ended with status {status}: {message}")
        is_copied = self.state.phase is Phase.REPORTING and (self.attempt / "candidate.pt").exists()
        if is_copied:  # history/ grows for years
            shutil.rmtree(self.attempt / "run" / "weights", ignore_errors=True)
        self._go_to(states.ended(self.state, status, self._facts(), self._request.rules, message))
        if self.state.phase is Phase.IDLE:
            self.failed += self.state.outcome is Outcome.FAILED
            say(f"attempt {number}: {self.state.outcome.value}. {self.state.detail}")
            say(f"report: {self.attempt / 'report.md'}")

    def _verdict(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.attempt / "verdict.json").read_text("utf-8"))
            return found
        except (FileNotFoundError, ValueError):
            return None

    def _spec(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.attempt / states.SPEC).read_text("utf-8"))
        return found

    def _go_to(self, state: State) -> None:
        states.save(self._state_file, state)
        self.state = state

    def _explain(self, error: OSError) -> str:
        if error.errno not in moves.FULL:
            return f"{error}. Trying again every {self._request.poll_s:g} s"
        history = self._request.work / "history"
        return (
            f"the disk is full: {error}. Nothing was lost. Free some space, for example by removing old folders of "
            f"{history} and of {self.collection.rejected}; the watch then goes on"
        )
