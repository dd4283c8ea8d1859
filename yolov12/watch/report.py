"""Report of one attempt, for the people of the line: report.md in plain language, report.json and pictures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from yolov12 import files
from yolov12.printable import printable
from yolov12.watch.comparison import ClassChange, Verdict
from yolov12.watch.pictures import Picture, save

__all__ = ["as_markdown", "write"]

_LISTED = 20  # most files that were set aside in report.md; report.json has all
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def write(
    folder: Path,
    attempt: Mapping[str, Any],
    verdict: Verdict | None,
    serving: Path,
    candidate: Path | None,
    new_images: Sequence[Path],
) -> None:
    """Write the report of an attempt. After a kill it may be written again: every file is whole, and is replaced.

    Args:
        folder: Folder of the attempt, with `run`, that of its training. It gets `report.md`, `report.json` and pictures
            `found-*.png`.
        attempt: What is known of the attempt; every entry may be missing. `number`; `outcome` ("promoted", "not
            promoted" or "failed"); `reason`, why it began; `detail`, why it failed or what went wrong after it;
            `started`, seconds since 1970; `images`, number of new images; `objects`, class → number of objects in them;
            `set_aside`, `file` and `reason` of what could not be used; `predict`, arguments of Ultralytics' `predict`
            for the pictures.
        verdict: Decision about the candidate; None if it was not compared.
        serving: Weights that served when the attempt began.
        candidate: Weights that the attempt trained; None if there are none.
        new_images: Images that arrived, for the pictures.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, obstacle = [], ""
    if candidate is not None and candidate.is_file() and serving.is_file():
        try:
            pictures = save(folder, serving, candidate, new_images, attempt.get("predict") or {})
        except (RuntimeError, ValueError, MemoryError) as error:  # a report without pictures is better than none
            obstacle = f"The pictures could not be drawn: {' '.join(str(error).split())}"
    run = _run(folder / "run")
    found = {
        **attempt,
        "verdict": asdict(verdict) if verdict is not None else None,
        "training": run,
        "pictures": [asdict(picture) for picture in pictures],
        "pictures_obstacle": obstacle,
    }
    text = as_markdown(attempt, verdict, run, pictures, obstacle)
    _save(folder / "report.json", json.dumps(found, indent=1, default=str) + "\n")
    _save(folder / "report.md", text)


def as_markdown(
    attempt: Mapping[str, Any],
    verdict: Verdict | None,
    run: Mapping[str, Any],
    pictures: Sequence[Picture] = (),
    obstacle: str = "",
) -> str:
    """Return the report as Markdown.

    Args:
        attempt: What is known of the attempt, as in `write`.
        verdict: Decision about the candidate; None if it was not compared.
        run: What is known of the training: `epochs`, `epochs_wanted`, `seconds`, `batch` and the content of
            memory.json.
        pictures: Pictures beside the report.
        obstacle: Why there are no pictures; empty if nothing failed.
    """
    outcome = str(attempt.get("outcome") or ("not promoted" if verdict is None or not verdict.promote else "promoted"))
    parts = [
        [f"# Attempt {attempt.get('number', '')}: {outcome}".replace(" :", ":"), _headline(outcome, attempt)],
        ["## What arrived", *_arrived(attempt)],
        ["## What was trained", *_trained(attempt, run)],
        ["## Why" if verdict is None or outcome != "promoted" else "## Why it was promoted", *_why(attempt, verdict)],
    ]
    if verdict is not None and verdict.classes:
        parts.append(["## Every class", _table(verdict.classes)])
    if pictures or obstacle:
        parts.append(["## Pictures", *([_text(obstacle)] if obstacle else []), *map(_picture, pictures)])
    if outcome != "promoted":
        parts.append(["## What to do next", *_next(attempt, verdict)])
    return "\n\n".join(paragraph for part in parts for paragraph in part if paragraph) + "\n"


def _headline(outcome: str, attempt: Mapping[str, Any]) -> str:
    if outcome == "promoted":
        late = (
            " It could not be exported, so an exported file is of an earlier model. Each hour, the watch tries again."
        )
        serves = "The candidate, which is the model that this attempt trained, serves now."
        return serves + (late if attempt.get("detail") else "")
    return "The serving model is the same as before. The new images are kept for the next attempt."


def _arrived(attempt: Mapping[str, Any]) -> Iterable[str]:
    began = f" The attempt began because of {_text(attempt['reason'])}." if attempt.get("reason") else ""
    yield f"{_counted(attempt.get('images') or 0, 'new labelled image')}.{began}"
    if objects := attempt.get("objects"):
        yield "\n".join(f"- {_text(name)}: {_counted(count, 'object')}" for name, count in objects.items())
    aside = list(attempt.get("set_aside") or ())
    if aside:
        more = [f"- and {len(aside) - _LISTED} more"] if len(aside) > _LISTED else []
        lines = [f"- {_text(each['file'])}: {_text(each['reason'])}" for each in aside[:_LISTED]]
        yield f"{_counted(len(aside), 'file')} could not be used and {_is(len(aside))} set aside:"
        yield "\n".join([*lines, *more])


def _trained(attempt: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[str]:
    if not run.get("epochs"):
        yield "No epoch of a training was completed."
        return
    of = f" of {run['epochs_wanted']}" if run.get("epochs_wanted") else ""
    began = f", begun on {_moment(attempt['started'])}" if attempt.get("started") else ""
    time = f" in {_duration(run['seconds'])}" if run.get("seconds") else ""
    yield f"{run['epochs']}{of} epochs{time}{began}."
    if run.get("batch") and run.get("micro_batch_median") and run.get("updates"):
        # Last batches of epochs are smaller, and all are if there are fewer images than `batch`.
        pieces, mean = run["micro_batch_median"], run["images"] / run["updates"]
        split = "in one piece" if pieces >= mean else f"in pieces of mostly {pieces}, with the same result"
        failures = run.get("out_of_memories") or 0
        yield (
            f"Batches of up to {_counted(run['batch'], 'image')} ran {split}. The highest memory use was "
            f"{run['peak_max_mib'] / 1024:.2f} GiB, and "
            + ("it never ran out." if not failures else f"it ran out {_counted(failures, 'time')} without any loss.")
        )


def _why(attempt: Mapping[str, Any], verdict: Verdict | None) -> Iterable[str]:
    if attempt.get("detail"):
        yield _text(attempt["detail"])
    if verdict is not None:
        yield "\n".join(f"- {_text(reason)}" for reason in verdict.reasons)
        yield (
            "The numbers are AP50-95: 1 means that every object is found exactly, 0 that none is. Classes that the "
            "serving model knows are measured on the old validation images, new ones on the new validation images."
        )
    elif not attempt.get("detail"):
        yield "No candidate was compared with the serving model."


def _table(classes: Sequence[ClassChange]) -> str:
    rows = ["| class | | objects | serving model | candidate | change |", "|---|---|--:|--:|--:|--:|"]
    for row in classes:
        # Adding 0.0 makes a negative zero positive.
        change = f"{round(-row.fall, 3) + 0.0:+.3f}" if row.candidate is not None and row.serving is not None else ""
        cells = (
            _text(row.name),
            "new" if row.is_new else "",
            row.objects,
            _ap(row.serving),
            _ap(row.candidate),
            change,
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _picture(picture: Picture) -> str:
    gained = ", ".join(f"{_text(name)} ({count})" for name, count in picture.gained.items())
    missed = ", ".join(f"{_text(name)} ({count})" for name, count in picture.missed.items())
    text = f"{_text(picture.image)}: only the candidate finds {gained}."
    return f"![{_text(picture.image)}]({picture.file})\n\n{text}" + (f" It misses {missed}." if missed else "")


def _next(attempt: Mapping[str, Any], verdict: Verdict | None) -> Iterable[str]:
    steps = []
    if verdict is None or verdict.promote:
        steps.append(
            "Read the reason above, and mend what it names. The watch tries again by itself: after an hour, then after "
            "longer and longer, up to a day. Started again, it tries at once."
        )
    else:
        fell = [row for row in verdict.classes if row.serving is not None and _fell(row, verdict.margin)]
        if fell:
            names = ", ".join(_text(row.name) for row in fell)
            steps += [
                f"Look at the labels of the new images, above all at {names}. Objects that are in an image and have no "
                "label, or the label of another class, teach the model to miss them.",
                f"Add labelled images that show {names}, as the line sees them today.",
                "Train longer, or replay more of the old images (`epochs`, `replay_fraction`).",
                f"If such a fall does not matter here, allow it with a larger `margin` (now {verdict.margin:g}).",
            ]
        elif not any(row.candidate is not None for row in verdict.classes if not row.is_new):
            steps.append("Give the old data set validation images that show the classes which the serving model knows.")
        else:
            steps += [
                "Look at the labels of the new images.",
                "Train longer, or replay more of the old images (`epochs`, `replay_fraction`).",
            ]
    yield "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _fell(row: ClassChange, margin: float) -> bool:
    return row.candidate is not None and not row.fall <= margin + 1e-9


def _run(folder: Path) -> dict[str, Any]:
    """Return what the folder of a training says. What is not there, or damaged, is left out."""
    found: dict[str, Any] = {}

    def results() -> None:
        rows = list(csv.DictReader((folder / "results.csv").read_text("utf-8").splitlines()))
        found.update(epochs=int(float(rows[-1]["epoch"])), seconds=float(rows[-1]["time"]))

    def arguments() -> None:
        from ultralytics.utils import YAML

        args = YAML.load(folder / "args.yaml")
        found.update(epochs_wanted=args["epochs"], batch=args["batch"], arguments=args)

    def memory() -> None:
        found.update(json.loads((folder / "memory.json").read_text("utf-8")))

    reads: Sequence[Callable[[], None]] = (memory, results, arguments)
    for read in reads:
        with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            read()
    return found


def _save(file: Path, text: str) -> None:
    files.write(file, lambda stream: stream.write(text.encode("utf-8", "replace")))


def _text(value: object) -> str:
    """Return text from a file of somebody else, which must neither forge a line nor be read as Markdown."""
    return _MARKDOWN.sub(r"\\\1", printable(str(value)))


def _ap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _is(count: int) -> str:
    return "was" if count == 1 else "were"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d at %H:%M")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
