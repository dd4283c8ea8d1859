"""Whole trainings on label-dense data in the memory of a T4, an A10 and an A100 with 40 GB, all on one larger card.

    python -m benchmarks cards --out benchmarks/results/cards.json               (about 25 minutes on one H200)
    python -m benchmarks cards --out part.json --only t4 --rows stock ours --seconds 590
    python -m benchmarks cards --out part.json --small --device cpu              (a minute on the CPU)

Only the memory is that of the imitated card; the speed is that of the card used. PyTorch reports 14,914 MiB on a T4,
22,592 MiB on an A10 and 40,442 MiB on an A100, of which the CUDA context takes 450 MiB. The rest is the `mem_limit` of
this package, which keeps a tenth of it free, and for all others the limit of PyTorch's allocator. Ultralytics reads the
memory of the imitated card.

All trainings have YOLO12-S at 640 (the v1.0 layout), 1,536 images, 2 % of them with 300 to 900 boxes, mosaic 1.0,
copy_paste 0.1, the same seed, 14 workers, `cache=ram`, `deterministic=True`, AMP, the same allocator setting, empty
caches of kernels and plans, and an optimizer step for about 256 images (`nbs=256`, no warm-up epochs). Each runs in a
process of its own, alone on the card; Ultralytics' without this package. Rows:

stock      the largest multiple of 8 at which a whole run has no out-of-memory error, no halved batch and no assignment
           image by image. Short runs (2 epochs, together on the card) find where to begin; whole runs then go down
           until one holds. `search` has all of them
ours       this package with batch=256
autobatch  Ultralytics with batch=-1, which takes 60 % of the memory
halving    Ultralytics with batch=256, which it halves up to three times when memory is short in the first epoch
all        our model in Ultralytics' loop with every top-level layer recomputed, at its largest stable multiple of 16

`images_per_s_all` is over the whole training, from the first batch on, `images_per_s_after_first` without the first
epoch. `peak_sd_mib` is the standard deviation of the peaks of optimizer steps in the second half of the training,
`peak_sd_all_mib` that of all. `allocator_failures` counts also allocations that cuDNN did without. A file keeps the
rows that it has; a row that `--seconds` cuts off is left out, and what its search has tried is kept. Each row has the
commit that it was measured at, and `commits` in `measured_on` has those of all rows.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from benchmarks.common import report
from benchmarks.dense_runs import Clock, OutOfTimeError
from benchmarks.dense_search import ROWS, TINY, Comparison, over
from benchmarks.dense_trainings import BATCH, EPOCHS, EQUAL, IMAGES, MODEL, SMALL, TRAIN
from benchmarks.drawings import noise

CARDS = {"t4": "T4", "a10": "A10", "a100": "A100 40GB"}
"""Part of the result → name in `yolov12.plan.cards`."""


def memory_of(name: str) -> dict[str, int]:
    """Return the memory of an imitated card: the arguments of `imitate`.

    Args:
        name: Key of `CARDS`.
    """
    from yolov12.plan.cards import card

    found = card(CARDS[name])
    total_mib, context_mib = found.total_bytes >> 20, found.system_bytes >> 20
    return {"total_mib": total_mib, "usable_mib": total_mib - context_mib}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return what the table says of ours: ratios, failures and lost images.

    Args:
        found: Content of a part of the result.
    """
    ours = found["rows"].get("ours", {})
    counts = ours.get("summary", {})
    return {
        **{f"{key}_over_stock": ratio for key, ratio in over(found).items()},
        "failure": ours.get("failure"),
        "out_of_memories": counts.get("out_of_memories"),
        "images_lost": counts.get("images_lost"),
    }


def main() -> int:
    """Measure what the file does not have yet, and write it after each training."""
    parser = report.parser(__doc__, parts=CARDS, small="a tiny model in tiny batches")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--again", action="store_true", help="measure rows that the file has already")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of {IMAGES} images, in every training")
    parser.add_argument("--seconds", type=float, default=0, help="time for the whole command; 0 for no limit")
    options = parser.parse_args()
    clock, failed = Clock(options.seconds), 0
    images, epochs = (16, 2) if options.small else (IMAGES, options.epochs)
    arguments = {**TRAIN, **EQUAL, "model": MODEL, **(SMALL if options.small else {})}
    result = report.Report(options.out, "cpu" if options.small else options.device, keep=True)
    data = noise(images, crowded=True)
    for name in options.only:
        memory = memory_of(name)
        setting = {"memory": memory, "images_an_epoch": images, "epochs": epochs, "arguments": arguments}
        found = result.get(name, {})
        if any(found.get(key) != value for key, value in setting.items()):
            found = {**setting, "rows": {}, "search": {}}  # rows of another setting cannot be compared
        more: dict[str, Any] = {**TINY, "memory": memory} if options.small else {"batch": BATCH, "memory": memory}
        save = functools.partial(_save, result, name)
        comparison = Comparison(data, images, epochs, arguments=arguments, save=save, clock=clock, found=found, **more)
        for row in options.rows:
            if options.again:
                found["rows"].pop(row, None)
            try:
                comparison.measure(row)
            except OutOfTimeError:
                print(f"{name}, {row}: cut off after {options.seconds:.0f} s", flush=True)
                return failed
            except RuntimeError as error:
                print(f"{name}, {row}: {error}", flush=True)
                failed = 1
        print(name, summary(found), flush=True)
    return failed


def _save(result: report.Report, name: str, found: dict[str, Any]) -> None:
    commits = {row: run.get("commit") for row, run in found["rows"].items()}
    result.add(name, {**found, "summary": summary(found)}, commits=commits)


if __name__ == "__main__":
    sys.exit(main())
