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

from yolov12.printable import printable
from yolov12.watch import attempts, damage, moves, state_file, states
from yolov12.watch.arguments import Request
from yolov12.watch.children import Child, Children, why
from yolov12.watch.collection import Collection
from yolov12.watch.digests import digest_of, digests_in
from yolov12.watch.inbox import Inbox, Pair
from yolov12.watch.log import say
from yolov12.watch.phases import SPEC, Action, Facts, Kind, Outcome, Phase, State
from yolov12.watch.promotion import promote, serves
from yolov12.watch.room import explained, obstacle
from yolov12.watch.samples import LARGEST_IMAGE, LARGEST_LABEL, UnusableError, check_image, read, read_label
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
        state = state_file.load(self._state_file)
        if state is None:  # somebody moved it away, to start anew with all images
            self._used_file.unlink(missing_ok=True)
            state = State(number=damage.last_number(request.work / "history"), started=clock())
        self.state = states.started(state)
        state_file.save(self._state_file, self.state)
        for name in (SPEC, "verdict.json"):
            damage.drop_damaged(self.attempt / name)
        self.collection = Collection(request.work, line.names, request.val_fraction, digests_in(self._used_file))
        self._child: Child | None = None
        self._log_bytes = 0  # of the log of the attempt when this process began
        self._has_told = False  # that an attempt keeps its arguments
        self._is_interrupted = True  # a previous watch may have been killed between two moves
        self._is_complete = True  # False if the inbox has more complete pairs than were taken
        self._stuck = Stuck()
        self._said: set[str] = set()
        self.failed = 0
        """Number of attempts and exports that failed."""

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
                problems.add(self._explained(error))
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
            problems.add(self._explained(error))
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
        """Folder of the attempt at work."""
        is_late = self.state.phase is Phase.EXPORTING_LATE
        return self._request.work / "history" / (self.state.unexported if is_late else self.state.attempt)

    def _facts(self) -> Facts:
        return Facts(
            now=self._clock(),
            new=self.collection.new_by_class(),
            used=self.collection.used_by_new_class(),
            new_images=len(self.collection.new),
            trainable=self.collection.is_trainable,
            is_running=self._child is not None,
            has_saved=attempts.has_saved(self.attempt),
            progress=attempts.progress(self.attempt) if self.state.phase is Phase.TRAINING else 0,
            has_room=self._obstacle() is None,
        )

    def _obstacle(self) -> OSError | None:
        return obstacle(self._line.places, self._request.work, self._request.model)

    def _explained(self, error: OSError) -> str:
        return explained(error, self._request.work, self._request.model, self._request.poll_s)

    def _is_model_changing(self) -> bool:
        """Return whether somebody may be writing the serving model."""
        return 0 <= self._clock() - self._request.model.stat().st_mtime < self._request.settle_s

    def _mend(self) -> None:
        """Start the attempt again if somebody has removed its folder, or a file of it is gone or empty."""
        if (lost := attempts.lost_file(self.attempt, self.state.phase)) is None:
            return
        self.stop()
        spec = self.attempt / SPEC
        what = "a file" if spec.exists() else "the folder"
        say(f"{what} of attempt {damage.number_of(self.attempt)} is gone: {lost}")
        if self.state.phase is not Phase.EXPORTING_LATE:
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
            self._start()
        elif action.kind is Kind.PROMOTE:
            model = Path(attempts.spec(self.attempt)["model"])
            why_not = promote(self.attempt / "candidate.pt", model, self.attempt / "before.pt")
            say(why_not or f"attempt {self.state.number} is promoted: {model}")
            self._go_to(states.promoted(self.state, self._request.rules, obstacle=why_not))
        elif action.kind is Kind.EXPORT:
            candidate = self._request.work / "history" / self.state.unexported / "candidate.pt"
            is_wanted = bool(self._request.export) and candidate.exists() and serves(candidate, self._request.model)
            self._go_to(states.export_again(self.state, serves=is_wanted))

    def _start(self) -> None:
        """Start the process of this phase."""
        folder, request, state = self.attempt, self._request, self.state
        given = {"data": self._line.data, "margin": request.margin, "export": request.export}  # may be new
        training = request.training if state.phase is Phase.TRAINING else None
        if attempts.renew(folder, training, **given) and not self._has_told:
            self._has_told = True
            words = " ".join(attempts.spec(folder)["training"])
            say(
                f"attempt {state.number} goes on with the arguments with which it began: {words or 'none'}. To begin "
                f"it again with those of now, remove {folder}"
            )
        if state.phase is Phase.REPORTING:
            outcome = {"outcome": state.outcome.value, "detail": state.detail, "ended": self._clock()}
            moves.save_text(folder / "outcome.json", json.dumps(outcome))
        log, task = folder / "log.txt", Phase.EXPORTING if state.phase is Phase.EXPORTING_LATE else state.phase
        self._log_bytes = log.stat().st_size if log.exists() else 0
        self._child = self._children.start(task.value, folder, log)

    def _prepare(self) -> None:
        """Fix the images of the attempt and the model that it starts from."""
        if not damage.has_content(self._request.model):
            raise FileNotFoundError(errno.ENOENT, "the serving model is empty", str(self._request.model))
        if not (self.attempt / SPEC).exists():
            self.attempt.mkdir(parents=True, exist_ok=True)
            for name in ("candidate.pt", "verdict.json"):  # of other images, if somebody has removed attempt.json
                (self.attempt / name).unlink(missing_ok=True)
            shutil.rmtree(self.attempt / "run", ignore_errors=True)
            self.collection.snapshot(self.attempt)
            moves.copy(self._request.model, self.attempt / "before.pt")
            content = attempts.described(self.state, self._request, self._line.data, self.collection)
            attempts.save_spec(self.attempt, content)
        used = digests_in(self.attempt / "train.txt") | digests_in(self.attempt / "val.txt")
        self._save_used(self.collection.used | used)
        self.collection.mark_used(used)

    def _save_used(self, digests: set[str]) -> None:
        moves.save_text(self._used_file, "".join(f"{digest}\n" for digest in sorted(digests)))

    def _look_at_child(self) -> None:
        if self._child is None or (status := self._child.poll()) is None:
            return
        self._child = None
        phase, number = self.state.phase, damage.number_of(self.attempt)
        verdict = attempts.verdict(self.attempt) if phase is Phase.JUDGING and not status else None
        if verdict is not None:
            self._go_to(states.judged(self.state, promote=verdict["promote"]))
            say(f"attempt {number}: {' '.join(verdict['reasons'])}")
            return
        status = 1 if phase is Phase.JUDGING and not status else status
        message = why(status, self.attempt / "log.txt", self._log_bytes) if status else ""
        if status:
            say(f"attempt {number}: {phase.value} ended with status {status}: {message}")
        is_copied = phase is Phase.REPORTING and (self.attempt / "candidate.pt").exists()
        if is_copied:  # history/ grows for years
            shutil.rmtree(self.attempt / "run" / "weights", ignore_errors=True)
        state = states.ended(self.state, status, self._facts(), self._request.rules, message)
        if phase is Phase.REPORTING and state.phase is Phase.IDLE:
            self._finish(state)
        elif phase is Phase.EXPORTING_LATE and state.phase is Phase.IDLE:
            self.failed += bool(status)
            say(f"attempt {number}: the model that serves is {'not ' if status else ''}exported")
        self._go_to(state)

    def _finish(self, state: State) -> None:
        """Tell how an attempt has ended. If it came to no result, its images are new again."""
        if states.is_inconclusive(state):
            images = {digest_of(Path(image)) for image in attempts.spec(self.attempt)["new_images"]}
            self._save_used(self.collection.used - images)  # first: after a kill, this is done again
            self.collection.mark_new(images)
        self.failed += state.outcome is Outcome.FAILED or state.unexported == state.attempt
        say(f"attempt {state.number}: {state.outcome.value}. {state.detail}")
        report = self.attempt / "report.md"
        say(f"report: {report}" if report.exists() else f"no report could be written, see {self.attempt / 'log.txt'}")

    def _go_to(self, state: State) -> None:
        state_file.save(self._state_file, state)
        self.state = state
