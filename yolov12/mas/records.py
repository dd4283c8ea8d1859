"""Records of batches that wait for their times, as the device runs behind the host; then the models learn from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from yolov12.mas.calibration import Calibration
from yolov12.mas.data_times import DataTimes
from yolov12.mas.distributed.ranks import RankStatus
from yolov12.mas.journal.explanation import DID_NOT_FIT, SHARE_DID_NOT_FIT
from yolov12.mas.journal.journal import Journal, Row, Summary
from yolov12.mas.memory.reading import Meter
from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.scheduling.planner import BatchReport
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.step.result import Result
from yolov12.mas.task import Share, Workload

__all__ = ["DoneBatch", "Records"]

_PATIENCE_S = 60.0
"""Most seconds to wait for the device at the end. It may hang, as in a collective whose other rank is gone."""


@dataclass(frozen=True)
class DoneBatch:
    """A batch that was run and whose time may not be known yet."""

    work: Workload
    """Properties of the batch."""
    report: BatchReport
    """Plan of the batch, and the memory it took."""
    ran: Result
    """What the step returned: micro-batches, and stopwatches of its own work."""
    share: Share
    """Description of the whole batch over all ranks."""
    fits: bool
    """False if the batch was not expected to fit at once with everything kept."""
    plan: str
    """Checkpoint plan of the last micro-batch, as the journal names it."""
    level: Level
    """The same plan, as decisions see it. Others may have replaced it when the time of the batch is known."""


class Records:
    """Queue of batches on their way to the journal, to the time model and to other ranks.

    Args:
        speed: Model of times; it learns from measured batches.
        calibration: Predicts which sizes fit.
        meter: Meter of the device.
        journal: Destination of rows; None for none.
        log: Called with lines for the user.
        shares: True if other ranks share each batch, and are told of times.
    """

    def __init__(
        self,
        speed: SpeedModel,
        calibration: Calibration,
        meter: Meter,
        journal: Journal | None,
        log: Callable[[str], None],
        *,
        shares: bool,
    ) -> None:
        self.speed, self.journal, self._shares = speed, journal, shares
        self._calibration, self._meter, self._log = calibration, meter, log
        self._done: list[DoneBatch] = []  # batches since the last update
        self._notes: list[str] = []  # events since the last update
        self._loaded: list[DataTimes] = []  # times of loading since the last update
        # Rows whose times are not known yet.
        self._rows: list[tuple[Row, list[DoneBatch], list[DataTimes]]] = []
        self._last_update = 0, 0.0  # epoch, and the host's time in seconds
        self._rows_made = 0
        self._unfit = 0  # images of the largest batch that did not fit
        self._status = RankStatus()

    @property
    def pending(self) -> bool:
        """True if batches were run since the last update."""
        return bool(self._done)

    def note(self, event: str) -> None:
        """Add an event to the row of the next update."""
        self._notes.append(event)

    def loaded(self, times: DataTimes) -> None:
        """Add the times in which a batch was loaded to the row of the next update."""
        self._loaded.append(times)

    def add(self, done: DoneBatch) -> None:
        """Add a batch that was run; its gradient waits for the next update."""
        self._done.append(done)
        work, events = done.work, done.report.events
        is_whole = len(done.ran.micro_batches) == 1 and not done.report.level
        failed = any(event.startswith("out-of-memory") for event in events)
        # A batch may also be split because the user wants it, or because its size has not been tried yet.
        if not is_whole and work.images > self._unfit and (failed or not done.fits):
            self._unfit = work.images
            self.note((SHARE_DID_NOT_FIT if self._shares else DID_NOT_FIT).format(work.images))

    def drop(self) -> None:
        """Count the batches since the last update as lost, because their gradients were dropped."""
        self.lost(sum(done.share.batch_images for done in self._done))
        self._done.clear()
        self._loaded.clear()

    def take_status(self) -> RankStatus:
        """Return the report of this rank's times to the other ranks. Each time is reported once."""
        status, self._status = self._status, RankStatus()
        return status

    def updated(self, epoch: int, events: tuple[str, ...] = ()) -> None:
        """Make the row of an update from the batches since the last one.

        Args:
            epoch: Number of the epoch, from 1.
            events: Events of the update itself.
        """
        self._rows_made += 1
        works, reports = [done.work for done in self._done], [done.report for done in self._done]
        last = reports[-1]
        row = Row(
            step=self.journal.next_step + len(self._rows) if self.journal is not None else self._rows_made,
            epoch=epoch,
            images=sum(done.work.images for done in self._done if not done.share.is_padding),
            micro_batches=tuple(size for done in self._done for size in done.ran.micro_batches),
            plan=self._done[-1].plan,
            image_size=f"{works[-1].height}x{works[-1].width}",
            max_boxes=max(work.most_boxes for work in works),
            predicted_bytes=max(report.predicted_bytes for report in reports),
            peak_bytes=max(report.peak_bytes for report in reports),
            reserved_bytes=last.reading.reserved_bytes,
            free_bytes=last.reading.free_bytes,
            budget_bytes=last.budget_bytes,
            step_ms=None,
            decode_ms=_sum([times.decode_ms for times in self._loaded]),
            augment_ms=_sum([times.augment_ms for times in self._loaded]),
            period_ms=self._period_ms(epoch),
            replayed=sum(done.ran.replayed for done in self._done),
            events=(*self._notes, *(event for report in reports for event in report.events), *events),
        )
        self._notes.clear()
        self._rows.append((row, list(self._done), list(self._loaded)))
        self._done.clear()
        self._loaded.clear()
        self._write(final=False)

    def _period_ms(self, epoch: int) -> float | None:
        """Return the milliseconds since the update before; None for the first update of an epoch."""
        (last_epoch, last_s), now_s = self._last_update, time.perf_counter()
        self._last_update = epoch, now_s
        return 1000 * (now_s - last_s) if epoch == last_epoch else None

    def lost(self, images: int) -> None:
        """Count images that entered a step and do not reach an update."""
        if self.journal is not None:
            self.journal.lost(images)

    def flush(self) -> None:
        """Write all rows to the journal; this waits for the device until their times are known, at most a minute."""
        self._write(final=True)
        try:
            if self.journal is not None:
                self.journal.flush()
        except OSError as error:
            self._end_journal(error)

    def close(self, updates_expected: int | None, *, is_exact: bool, bn_group: int | None) -> Summary | None:
        """Write all rows, like `flush`, and finish the journal, if there is one.

        Args:
            updates_expected: Number of updates that this process should have made, for the summary. If it made them,
                batches that still wait for one are not lost: the training loop has left them over.
            is_exact: True if the gradient of a batch does not depend on how it is split into BatchNorm groups.
            bn_group: Number of images that BatchNorm normalises together.

        Returns:
            The summary of the run; None without a journal, or if the journal could not be written.
        """
        if self.journal is None:
            return None
        if updates_expected is None or self._rows_made < updates_expected:
            self.drop()
        self._write(final=True)
        try:
            if self.journal is None:  # it could not be written
                return None
            return self.journal.close(updates_expected=updates_expected, is_exact=is_exact, bn_group=bn_group)
        except OSError as error:
            self._log(f"memory: the journal is not complete, as it could not be written: {error}")
            return None

    def _write(self, *, final: bool) -> None:
        """Write the rows whose times are known, in order; with `final`, all rows, after a wait for their times."""
        end_s = time.monotonic() + _PATIENCE_S if final else 0.0
        while self._rows:
            row, batches, loaded = self._rows[0]
            times = [done.ran.watch.elapsed_ms() for done in batches]
            step_ms, wait_ms = _sum(times), _sum([each.wait.elapsed_ms() for each in loaded])
            if step_ms is None or (wait_ms is None and loaded):
                if not final:
                    return
                if time.monotonic() < end_s:
                    time.sleep(1e-3)  # the device is still at work
                    continue
            del self._rows[0]
            for done, time_ms in zip(batches, times, strict=True):
                if time_ms is not None and done.report.undisturbed:
                    self._learn(done, time_ms)
            if self.journal is not None:
                self.journal.busy(self._meter.busy_percent())
                try:
                    sensors = self._meter.sensors()
                    power_w, temperature_c = sensors.power_w, sensors.temperature_c
                    self.journal.add(
                        replace(
                            row, step_ms=step_ms, data_wait_ms=wait_ms, power_w=power_w, temperature_c=temperature_c
                        )
                    )
                except OSError as error:
                    self._end_journal(error)

    def _end_journal(self, error: OSError) -> None:
        """Go on without the journal, as a full disk does not end a training."""
        self._log(f"memory: the journal ends here, as it cannot be written: {error}. The training continues")
        self.journal = None

    def _learn(self, done: DoneBatch, ms: float) -> None:
        work, level, ran = done.work, done.report.level, done.ran
        if self.speed.levels[level : level + 1] != (done.level,):
            return
        for images, usual_ms in ran.usual_ms.items():
            self.speed.observe_micro_batch(images, work.height, work.width, level, usual_ms)
        if ran.has_captured or (ran.waits_for_capture and ran.replayed):
            return
        replays = done.report.replays and not ran.waits_for_capture
        usual = all(self.speed.seen(size, work.height, work.width, level, replays) for size in ran.micro_batches)
        if usual and self._shares and not done.share.is_padding:
            self._status = RankStatus(max(work.images, self._images_as_fast(done)), ms)
        ahead_ms = (ran.ahead.elapsed_ms() or 0.0) if ran.ahead is not None else 0.0
        self.speed.observe(ran.micro_batches, work.height, work.width, level, ms - ahead_ms, ahead_ms, replays=replays)

    def _images_as_fast(self, done: DoneBatch) -> int:
        """Number of images that would have taken no longer, in micro-batches as large as host time and memory allow.

        A small share is launch-bound. Without this, its rank would look slow and get ever fewer images.
        """
        work, report, group = done.work, done.report, self._calibration.bn_group or 1
        flat = self.speed.flat_images(work.height, work.width)
        images, last = 0, self._calibration.levels - 1
        while images + group <= flat and self._calibration.fits(
            max(2 * images, group), work, level=last, reading=report.reading, budget_bytes=report.budget_bytes
        ):
            images = max(2 * images, group)
        return min(images, int(flat)) * len(done.ran.micro_batches)


def _sum(times_ms: Sequence[float | None]) -> float | None:
    """Return the sum of times; None if one of them is unknown, or if there are none."""
    known = [each for each in times_ms if each is not None]
    return sum(known) if known and len(known) == len(times_ms) else None
