"""Accuracy of whole trainings in docs/reference/measurements.md."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks.accuracy_table import difference
from scripts.figures.measured_steps import HOW, list_of, measured
from scripts.figures.pages import Passage, result, say, sentence, setting, table


@measured("Accuracy of small trainings")
def accuracy() -> Iterator[Passage]:
    """Yield the passages on mAP of small trainings on the CPU."""
    found = result("accuracy")["cpu"]
    settings, rows = found["settings"], {row["variant"]: row for row in found["table"]}
    yield sentence(
        "{} images of {} pixels, each of them {} times in {} epochs with mosaic, AdamW with a learning rate of {}",
        *(settings[name] for name in ("images", "imgsz", "passes", "epochs", "lr0")),
    )
    yield sentence("on {} other images", settings["val"])
    (small,) = settings["candidates"]
    yield sentence("run micro-batches of {} images", small)
    large = settings["large"]
    updates = {run["variant"]: run["updates"] for run in found["runs"]}
    names = {
        "stock": ("Ultralytics, `batch=16`", small),
        "nbs256": ("Ultralytics, `batch=16 nbs=64`", large),
        "stock256": ("Ultralytics, `batch=64`", large),
        "256": ("this package, `batch=64` in micro-batches of 16", large),
    }
    lines = []
    for variant, (name, images) in names.items():
        row = rows[variant]
        figures = [list_of("{:.3f}", row["map"]), *(say("{:.3f}", row[key]) for key in ("mean", "sd"))]
        lines.append([name, str(images), str(updates[variant]), *figures])
    yield table("| | images in an update | updates | seeds 0, 1 | mean | standard deviation |", lines)
    split = rows["256"]["against_stock256"]
    assert split["difference"] >= 0
    yield sentence(
        "A batch of {} that is split has the higher mean than the same batch at once: {:.3f} and {:.3f}",
        *(large, rows["256"]["mean"], rows["stock256"]["mean"]),
    )
    yield sentence("the 95 % confidence interval of this one is ±{:.3f}", split["interval"])
    half = {
        variant: [run["map"][settings["epochs"] // 2 - 1] for run in found["runs"] if run["variant"] == variant]
        for variant in ("256", "stock256")
    }
    assert min(half["256"]) - max(half["stock256"]) > split["difference"]
    yield sentence(
        "it is ahead by more: {:.3f} and {:.3f} for the two seeds, and {:.3f} and {:.3f} at once",
        *(half["256"] + half["stock256"]),
    )
    late = [run["map"] for run in found["runs"] if run["variant"] in ("stock256", "256")]
    assert all(curve[-1] > max(curve[:-3]) for curve in late)  # still get better
    behind = [rows["stock"]["mean"] - rows[variant]["mean"] for variant in ("stock256", "256")]
    yield sentence(
        "a batch of {} makes {} updates in place of {}. Both trainings with it end {:.2f} and {:.2f} below those with "
        "a batch of {}",
        *(large, updates["256"], updates["stock"], *behind, small),
    )
    yield sentence(
        "a batch of {} and `nbs=64` has as many images in an update. It ends at {:.2f} in the mean. It differs from a "
        "batch of {} in three ways",
        *(small, rows["nbs256"]["mean"], large),
    )
    yield sentence(
        "BatchNorm's running statistics for every {} images, as this package does in groups of {}. Ultralytics with a "
        "batch of {} moves them once",
        *(small, next(run["engine"]["bn_group"] for run in found["runs"] if run["variant"] == "256"), large),
    )
    decay = {run["variant"]: max(run["batch"] / run["nbs"], 1) for run in found["runs"]}  # Ultralytics' factor
    assert (decay["stock256"], decay["256"], decay["stock"], decay["nbs256"]) == (4, 4, 1, 1)
    yield sentence("four times as high with a batch of {} and `nbs=16`", large)
    yield sentence("a quarter of that of the batch of {}", large)
    yield sentence("It makes {} updates in place of {}, as", updates["nbs256"], updates["256"])
    places = {row["variant"]: row for row in result("accuracy_places")["table"]}
    yield setting("with `--only 256 device --seeds 0 1 2`, the training with `batch=64`", HOW)
    yield sentence(
        "ends at {:.3f}, {:.3f} and {:.3f} with images from the host, and at {:.3f}, {:.3f} and {:.3f} with images",
        *(places["256"]["map"] + places["device"]["map"]),
    )
    assert abs(places["256"]["mean"] - places["device"]["mean"]) < min(row["sd"] for row in places.values())


@measured("Accuracy of longer small trainings")
def longer_accuracy() -> Iterator[Passage]:
    """Yield the passages on mAP of small trainings that last three times as long."""
    short, found = (result("accuracy")[part] for part in ("cpu", "cpu_long"))
    differing = {key for key, value in found["settings"].items() if value != short["settings"][key]}
    assert differing == {"passes"}
    passes = (part["settings"]["passes"] for part in (found, short))
    yield sentence("with each image {} times in place of {}, in 20 longer epochs", *passes)
    yield sentence("at commit {}. The model", result("accuracy")["measured_on"]["cpu_long"]["commit"])
    (least,) = found["settings"]["candidates"]
    names = {
        "stock": f"Ultralytics, `batch={least}`",
        "stock256": "Ultralytics, `batch=64`",
        "256": "this package, `batch=64` in micro-batches of 16",
        "256lr": "the same with twice the learning rate",
    }
    rows = {row["variant"]: row for row in found["table"]}
    runs = {variant: [run for run in found["runs"] if run["variant"] == variant] for variant in names}
    lines = []
    for variant, name in names.items():
        row, against = rows[variant], rows[variant].get("against_stock", {})
        (rate,), (updates,) = ({run[key] for run in runs[variant]} for key in ("lr0", "updates"))
        told = [say("{:g}", rate), say("{:,}", updates), list_of("{:.3f}", row["map"])]
        told += [say("{:.3f}", row[key]) for key in ("mean", "sd")]
        lines.append([name, *told, say("{difference:+.3f} ± {interval:.3f}", **against) if against else ""])
    yield table(
        "| | learning rate | updates | seeds 0, 1, 2 | mean | standard deviation | to `batch=16`, 95 % confidence |",
        lines,
    )
    less, faster = (rows[variant]["against_stock"] for variant in ("256", "256lr"))
    before = next(row for row in short["table"] if row["variant"] == "256")["mean"]
    stock = next(row for row in short["table"] if row["variant"] == "stock")["mean"]
    yield sentence("ends {:.3f} ± {:.3f} below Ultralytics with the small batch", -less["difference"], less["interval"])
    yield sentence("In the shorter trainings above, it was {:.3f} below", stock - before)
    assert max(rows["256"]["map"]) < min(rows["stock"]["map"])
    assert abs(rows["256"]["mean"] - stock) < 0.001
    yield setting("After 240 passes, it has what the small batch had after 80", "asserted above")
    yield setting("A batch four times as large", "64 / 16")
    yield setting("makes a quarter of the updates", "64 / 16")
    yield sentence("with Adam, it ends {:.3f} ± {:.3f} below", -faster["difference"], faster["interval"])
    same = rows["256"]["against_stock256"]
    below = difference(rows["stock256"]["map"], rows["stock"]["map"])
    words = "ends {:.3f} ± {:.3f} below Ultralytics with the small one"
    yield sentence(words, -below["difference"], below["interval"])
    yield sentence("differs from it by {:+.3f} ± {:.3f}", same["difference"], same["interval"])
    late = {
        variant: [mean(mean(run["map"][start : start + 5]) for run in each) for start in (10, 15)]
        for variant, each in runs.items()
    }
    rises = [after - before for before, after in late.values()]
    yield sentence("last quarter of the epochs is {:.3f} to {:.3f} above that", min(rises), max(rises))


@measured("Accuracy of trainings on a GPU")
def accuracy_on_gpu() -> Iterator[Passage]:
    """Yield the passages on mAP of trainings with stock's batch, with 256, and beside a neighbour."""
    found = result("accuracy")["gpu"]
    settings, runs = found["settings"], found["runs"]
    yield sentence("on {:,} boards of {} pixels (`demo`)", settings["images"], settings["imgsz"])
    yield sentence("or {:,} that are harder", settings["images"] // 2)
    seen = settings["images"] * settings["passes"]
    yield sentence("{:,} images in {} epochs", seen, settings["epochs"])
    yield sentence("under a limit of {:.0f} GiB for each training", settings["limit_gib"])
    batches = {row["model"]: row["batch"] for row in found["stock_batch"]}
    assert all(batches[row["model"]] == row["batch"] for row in found["stock_batch"])
    yield sentence("{} for N and {} for S", batches["n"], batches["s"])
    yield sentence("on {} other boards", settings["val"])
    (one,) = {run["batch"] for run in runs if run["variant"] == "nbs256"}
    together = round(256 / one)  # as Ultralytics rounds
    yield sentence("with an update for {} batches, {} images", together, together * one)
    late = result("accuracy")["measured_on"]["gpu"]["later"]["commit"]
    (first,) = {run["commit"] for run in runs} - {late}
    for run in runs:
        is_late = run["variant"] == "nbs256" or (run["seed"] == 2 and run["variant"] != "neighbour")
        assert run["commit"] == (late if is_late else first)
    yield sentence("at commit {}. The third seed, except of the neighbour", first)
    yield sentence("(2026-11-30, at commit {}, `later` in the JSON)", late)
    short = [run["assigner_fallbacks"] for run in runs if run["variant"] in ("stock", "nbs256")]
    yield sentence("In {} of its {} trainings, memory for the assignment", sum(map(bool, short)), len(short))
    assert sorted(run["seed"] for run in runs if run["variant"] == "nbs256") == [0, 2]
    yield setting("after its seeds 0 and 2 with N on `hard`", "seeds")
    names = {"stock": "Ultralytics", "nbs256": "Ultralytics, `nbs=256`", "same": "this package"}
    names |= {"256": "`batch=256`", "neighbour": "and a neighbour"}
    rows = {(row["data"], row["model"], row["variant"]): row for row in found["table"]}
    updates = {(run["data"], run["model"], run["variant"]): run["updates"] for run in runs}
    lines, same, large, beside = [], [], [], []
    for data in ("demo", "hard"):
        for model in "ns":
            for variant, name in names.items():
                key = data, model, variant
                if key not in rows:
                    continue
                row, against = rows[key], rows[key].get("against_stock", {})
                difference = say("{difference:+.3f} ± {interval:.3f}", **against) if against else ""
                maps = list_of("{:.3f}", row["map"])
                label = f"{data}, {model.upper()}, {name}"
                lines.append([label, say("{:,}", updates[key]), maps, say("{:.3f}", row["mean"]), difference])
                if variant == "same":
                    same.append(against)
                elif variant in ("256", "neighbour"):
                    large.append(-against["difference"])
                if variant == "neighbour":
                    beside.append(abs(row["mean"] - rows[data, model, "256"]["mean"]))
    yield table(
        "| data, model, variant | updates | mAP50-95 of each seed | mean | to Ultralytics, 95 % confidence |", lines
    )
    assert len(same) == 4
    assert all(abs(each["difference"]) < each["interval"] for each in same)
    assert sum(each["difference"] > 0 for each in same) == 3
    yield setting("all four differences", HOW)
    yield sentence("the intervals are up to {:.2f} wide to each side", max(each["interval"] for each in same))
    yield sentence("by {:.2f} to {:.2f}. It makes", min(large), max(large))
    yield sentence("It makes {} updates, with", updates["demo", "n", "256"])
    yield sentence("batch, in place of {} or {:,}", updates["demo", "s", "stock"], updates["demo", "n", "stock"])
    assert all(max(run["map"][-2:]) == max(run["map"]) for run in runs)  # still get better
    yield sentence(
        "Ultralytics ends at {:.3f} in place of {:.3f}. This package with `batch=256` ends at {:.3f}",
        *(rows["hard", "n", variant]["mean"] for variant in ("nbs256", "stock", "256")),
    )
    less = rows["hard", "n", "256"]["against_nbs256"]
    yield sentence("which is lower by {:.3f} ± {:.3f}", -less["difference"], less["interval"])
    yield sentence("There, Ultralytics makes {} updates", updates["hard", "n", "nbs256"])
    decay = {run["variant"]: max(1, round(run["nbs"] / run["batch"])) * run["batch"] / run["nbs"] for run in runs}
    assert 0.2 < decay["nbs256"] / decay["256"] < 0.3  # Ultralytics multiplies the weight decay by it
    (taken,) = found["neighbour_mib"]
    yield sentence("took up to {:.0f} GiB", taken["most"] / 1024)
    pressed = [run["engine"] for run in runs if run["variant"] == "neighbour"]
    assert len(pressed) == 6
    budgets = [each["budget_min_mib"] / 1024 for each in pressed]
    yield sentence("as little as {:.1f} to {:.1f} GiB", min(budgets), max(budgets))
    assert sum(each["out_of_memories"] for each in pressed) == 5
    assert not any(each["images_lost"] for each in pressed)
    yield sentence("within {:.3f} of those without", max(beside))


class Longer:
    """Curves of the longer trainings on a GPU, and of earlier ones that did not end.

    Attributes:
        batch: Batch of Ultralytics under the memory limit.
        runs: Rows of the trainings of each variant.
        rows: Row of each variant in the table of the last epochs.
        settings: Settings of all of them.
        per_epoch: Images in an epoch.
        same_until: Epochs of the earlier trainings of Ultralytics with a batch of 256.
    """

    def __init__(self) -> None:
        found, earlier = (result("accuracy")[part] for part in ("gpu_long_2", "gpu_long"))
        self.settings = found["settings"]
        assert self.settings == earlier["settings"]
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for run in sorted(found["runs"], key=lambda run: run["seed"]):
            self.runs.setdefault(run["variant"], []).append(run)
        (self.batch,) = {run["batch"] for run in self.runs["stock"]}
        self.rows = {row["variant"]: row for row in found["table"]}
        self.per_epoch = self.settings["images"] * self.settings["passes"] // self.settings["epochs"]
        self._earlier: dict[str, list[list[float]]] = {}
        for run in earlier["runs"]:
            self._earlier.setdefault(run["variant"], []).append(run["map_so_far"])
        (self.same_until,) = {len(curve) for curve in self._earlier["stock256"]}

    def seen(self, epoch: int) -> str:
        """Return the number of images until the end of an epoch."""
        return say("{:,}", self.per_epoch * epoch)

    def mean(self, variant: str, epoch: int) -> float:
        """Return the mean mAP of a variant after an epoch."""
        return mean(run["map"][epoch - 1] for run in self.runs[variant])

    def below(self, variant: str) -> tuple[float, float]:
        """Return how far it ends below Ultralytics with the small batch, and the interval."""
        less = self.rows[variant]["against_stock"]
        return -less["difference"], less["interval"]

    def same(self) -> list[list[float]]:
        """Return the mAP with a batch of 256, of this package and of Ultralytics, after `same_until` epochs."""
        return [[curve[self.same_until - 1] for curve in self._earlier[variant]] for variant in ("256", "stock256")]

    def to_the_same_batch(self) -> tuple[float, float]:
        """Return the difference to Ultralytics with a batch of 256, and the interval, after `same_until` epochs."""
        same = difference(*self.same())
        assert abs(same["difference"]) < same["interval"]
        return same["difference"], same["interval"]


@measured("Accuracy of longer trainings on a GPU")
def longer_accuracy_on_gpu() -> Iterator[Passage]:
    """Yield the passages on mAP of longer trainings with different batches."""
    found, heads = Longer(), result("accuracy")["measured_on"]
    short, settings = result("accuracy")["gpu"]["settings"], found.settings
    assert {key for key, value in settings.items() if value != short[key]} == {"passes", "epochs"}
    runs = [run for each in found.runs.values() for run in each]
    assert all(run["mps"] for run in runs)
    yield sentence("`gpu_long_2`), at commit {}, with NVIDIA's", heads["gpu_long_2"]["commit"])
    words = "each image {} times in place of {}, in {} epochs of {:,} images"
    yield sentence(words, settings["passes"], short["passes"], settings["epochs"], found.per_epoch)
    names = {
        "stock": f"Ultralytics, `batch={found.batch}`",
        "256": "this package, `batch=256`",
        "256lr": "the same with twice the learning rate",
    }
    lines = []
    for variant, name in names.items():
        row, against = found.rows[variant], found.rows[variant].get("against_stock", {})
        (rate,), (updates,) = ({run[key] for run in found.runs[variant]} for key in ("lr0", "updates"))
        told = [say("{:g}", rate), say("{:,}", updates), list_of("{:.3f}", row["map"])]
        told += [say("{:.3f}", row[key]) for key in ("mean", "sd")]
        lines.append([name, *told, say("{difference:+.3f} ± {interval:.3f}", **against) if against else ""])
    yield table(
        f"| | learning rate | updates | seeds 0, 1, 2 | mean | standard deviation | to `batch={found.batch}`, "
        "95 % confidence |",
        lines,
    )
    early, last = 10, settings["epochs"]
    behind = {variant: found.mean("stock", early) - found.mean(variant, early) for variant in ("256", "256lr")}
    words = "this package with `batch=256` ends {:.3f} ± {:.3f} below Ultralytics with {}"
    yield sentence(words, *found.below("256"), found.batch)
    yield sentence("a larger one may fit. After {} images, it was {:.3f} below", found.seen(early), behind["256"])
    (fewer,), (more,) = ({run["updates"] for run in found.runs[variant]} for variant in ("256", "stock"))
    yield sentence("It makes {:,} updates in place of {:,}, with", fewer, more)
    yield sentence("twice the learning rate, it ends {:.3f} ± {:.3f} below", *found.below("256lr"))
    assert found.runs["256lr"][0]["lr0"] == 2 * found.runs["256"][0]["lr0"]
    yield sentence("Here, it was {:.3f} below after {} images", behind["256lr"], found.seen(early))
    reached = next(e for e in range(1, last) if found.mean("stock", e) >= found.mean("256lr", last))
    yield sentence("It ends with what Ultralytics had after {} of {} images", found.seen(reached), found.seen(last))
    yield setting("With the same batch of 256, no difference", "asserted by `to_the_same_batch`")
    yield sentence("of trainings that were cut off (2026-11-30, commit {}, part", heads["gpu_long"]["commit"])
    words = "it is {:+.3f} ± {:.3f} after {} images. One of"
    yield sentence(words, *found.to_the_same_batch(), found.seen(found.same_until))
    lowest, *others = sorted(found.same()[0])
    yield sentence("seeds is {:.2f} below the others", min(others) - lowest)
    rises = [found.mean(variant, last) - found.mean(variant, last - 5) for variant in names]
    yield sentence("in the last five epochs, the means rise by {:.3f} to {:.3f}", min(rises), max(rises))
    yield setting("last four, there is no mosaic", "close_mosaic")
    yield setting("In the last 20, they rise", "half of the epochs, asserted below")
    assert settings["close_mosaic"] == 4
    assert last == 40
    half = [found.mean(variant, last) - found.mean(variant, last // 2) for variant in names]
    words = "they rise by {:.3f} with {}, {:.3f} with 256 and {:.3f} with twice"
    yield sentence(words, half[0], found.batch, *half[1:])
    assert not any(run["halvings"] or run["assigner_fallbacks"] for run in runs)
    engines = [run["engine"] for run in runs if "engine" in run]
    assert not any(each["out_of_memories"] or each["images_lost"] for each in engines)
    sizes = min(each["micro_batch_min"] for each in engines), max(each["micro_batch_max"] for each in engines)
    yield sentence("micro-batches of {} to {} images under", *sizes)
