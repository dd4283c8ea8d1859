"""Trainings and loaders in docs/reference/measurements.md."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks.accuracy_table import difference
from scripts.figures.measured_steps import HOW, list_of, measured, sizes
from scripts.figures.pages import Passage, result, say, sentence, setting, table


def journal(run: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of memory.csv of a run."""
    return list(csv.DictReader(run["memory_csv"]))


@measured("Images that get smaller")
def smaller() -> Iterator[Passage]:
    """Yield the passages on images that get smaller."""
    found = result("dense")
    rows, off = journal(found["ladder"]["auto"]), found["off"]
    yield setting("YOLOv12-X at 1,280 pixels, `batch=4`, 8 workers", HOW)
    yield sentence("until the budget of the run is {:,.0f} MiB", found["ladder"]["budget_mib"])
    small = [int(row["step"]) for row in rows if row["image_size"] == "1184x1184" and sizes(row) == [1, 1, 1, 1]]
    changes = [int(row["step"]) for row in rows if row["events"] and row["events"] != "groups of 1"]
    yield sentence("From training step {} to training step {}, the run changed", changes[0], small[0])
    yield setting("then to 1,184 pixels, which is three resolution steps lower", "asserted below")
    yield sentence("It ran {} training steps in this way", len(small))
    assert sum(row["image_size"] == "1184x1184" for row in rows[small[-1] :]) > 0
    up = [int(row["step"]) for row in rows if re.match(r"image size (1184|1216|1248) to", row["events"])]
    yield sentence("after the training steps {}, {} and {}", *up)
    yield sentence("It made all of its {} steps", len(rows))
    later = sum(row["image_size"] != "1280x1280" for row in rows if int(row["step"]) > up[-1])
    yield sentence("In {} later steps images were smaller again", later)
    first, second = off
    needs, budget = re.findall(r"([\d,]+) MiB at its peak, the budget is ([\d,]+) MiB", first["log_tail"])[0]
    yield sentence("`mem_limit` was {:,} MiB, which gives the same budget", first["mem_limit_mib"])
    yield sentence('"one image needs {} MiB at its peak, the budget is {} MiB"', needs, budget)
    yield sentence("The error proposed a limit of {:,} MiB", second["mem_limit_mib"])
    assert not any(second.get(key) for key in ("exit_status", "failure"))
    yield sentence("highest peak of {:,.0f} MiB", max(float(row["peak_mib"]) for row in journal(second)))


@measured("The smoke suite, and the tests marked `gpu`")
def smoke() -> Iterator[Passage]:
    """Yield the passages on the tests that ran on GPUs."""
    found = result("smoke")["marked_gpu"]
    everything = found["all_of_them"]
    assert found["failed"] == everything["failed"] == 0
    yield sentence("All {} tests marked `gpu` in `tests/mas` and `tests/training` pass", found["passed"])
    assert len(everything["rerun_after_a_mend_of_the_test"]) == 1
    latest = found["kernels_of_2026_11_29"]
    assert sum(latest["by_part"].values()) == latest["passed"]
    yield sentence(
        "On 2026-11-25, all {} tests marked `gpu` passed on an H100, one of them in a second run", everything["passed"]
    )
    yield sentence("{} of {} tests passed on an H200", latest["passed"], latest["passed"] + latest["failed"])
    assert len(latest["rerun_after_a_mend_of_the_test"]) == 4
    graphs, *_, repeated, newest = found["graphs_of_2026_11_30"]["runs"]
    for run in (repeated, newest):
        assert (run["failed"], run["passed"]) == (0, graphs["passed"])
    failed, passed, again = found["kernels_ahead_of_2026_11_30"]["runs"]
    assert (failed["failed"], failed["commit"], passed["failed"]) == (1, graphs["commit"], 0)
    assert (again["failed"], again["commit"]) == (0, repeated["commit"])
    words = "Both passed at commit {}, too, and those of CUDA graphs at commit {} as well"
    yield sentence(words, again["commit"], newest["commit"])
    outcomes = result("verified_h200")["outcomes"]
    again = "test_trains_under_pressure", "test_validates", "test_onnx_finds_the_same"
    assert all(outcomes[name] == "passed" for name in again)
    yield sentence("On 2026-11-30, at commit {} on an H200, the checks above passed again", graphs["commit"])
    yield sentence("so did all {} tests of CUDA graphs", graphs["passed"])
    yield sentence("failed there, and passed at commit {}, after the keys", passed["commit"])


@measured("Loading ahead")
def loading() -> Iterator[Passage]:
    """Yield the passages on batches that workers prefetch."""
    found = result("loading")
    yield setting("16 cores", "the machine")
    yield setting("1,280 images of the demonstration data, with mosaic and 8 workers", HOW)
    lines = []
    for ahead, name in ((4, "4, as in Ultralytics"), (2, "2")):
        rows = [[row for row in found[scale]["rows"] if row["ahead"] == ahead] for scale in "sx"]
        keys = ("images_per_s", "images_per_s_with_val")
        lines.append([name, *(list_of("{:.0f}", [row[key] for row in each]) for each in rows for key in keys)])
    yield table(
        "| batches that each worker prefetches | YOLOv12-S, batch 128 | with validations | YOLOv12-X, batch 64 "
        "| with validations |",
        lines,
    )
    waits = [row["wait_ms"]["median"] for scale in "sx" for row in found[scale]["rows"]]
    yield sentence("a step waits {:.1f} to {:.1f} ms for its batch", min(waits), max(waits))
    yield setting("The second run of X with 2 batches did not finish", "a label")
    yield setting("The engine uses 2 batches", "a default")
    yield setting("saves 16 batches of 128 images, which are 2.5 GB", "computed: 16 × 128 × 3 × 640 × 640 bytes")
    yield setting("takes effect 17 batches later instead of 33", "computed: 2 × 8 + 1 and 4 × 8 + 1")


@measured("The training loader on the CPU")
def loader() -> Iterator[Passage]:
    """Yield the passages on the training loader."""
    found = result("loader")
    yield setting(
        "640 drawn images with the sizes of photographs in COCO, JPEG files of 150 kB, are loaded at 640", HOW
    )
    yield setting("pixels in batches of 16", HOW)
    yield setting("the median of 20 pairs of batches", HOW)
    yield setting("in two rounds of 20 batches", HOW)
    names = {
        "files": "JPEG files, mosaic",
        "files, mixup": "JPEG files, mosaic and `mixup=0.15`",
        "files, no mosaic": "JPEG files, `mosaic=0`",
        "ram": "`cache=ram`, mosaic",
        "files, 2 workers": "JPEG files, mosaic, 2 workers (all processes)",
        "ram, 2 workers": "`cache=ram`, mosaic, 2 workers (all processes)",
    }
    keys = ("stock_cpu_ms", "ours_cpu_ms", "ratio")
    lines = [[name, *(say("{:.2f}", found[case][key]) for key in keys)] for case, name in names.items()]
    yield table("| | Ultralytics | this package | ratio |", lines)
    stages = {
        "read the file": "read",
        "decode JPEG": "decode",
        "resize": "resize",
        "mosaic canvas": "canvas",
        "affine warp": "warp",
        "colours (HSV)": "colours",
        "order of channels, flips": "channels, flips",
        "stack the batch": "batch",
        "labels and everything else": "labels and the rest",
    }
    spent = found["files, stages"]
    lines = [[name, *(say("{:.2f}", spent[who][stage]) for who in ("stock", "ours"))] for name, stage in stages.items()]
    yield table("| | Ultralytics | this package |", lines)


@measured("The weights of the demonstration")
def demo_model() -> Iterator[Passage]:
    """Yield the passages on the model that comes with the package."""
    found = result("demo_model")
    validation = found["validation"]
    assert found["command"].endswith("--images 5000 --epochs 42")
    yield sentence("YOLOv12-N at {} pixels for 42 epochs on 4,750 boards", found["training"]["imgsz"])
    yield sentence("`data={}` in batches of {}, in {} s", found["data"], found["training"]["batch"], found["seconds"])
    yield setting("On 200 boards of another seed", "the data")
    yield sentence("its AP50 is {:.3f} and its AP50-95 is {:.3f}", validation["map50"], validation["map50_95"])
    classes = dict(validation["map50_of_class"])
    yield sentence("their AP50 is {:.2f}, that of every other class is above 0.92", classes.pop("bridge"))
    assert min(classes.values()) > 0.92


@measured("New classes")
def classes() -> Iterator[Passage]:
    """Yield the passages on classes that arrive."""
    found = result("classes")
    yield sentence("half trained: {} epochs on the 8 classes", found["base_epochs"])
    yield setting("YOLOv12-N at 320 pixels", HOW)
    yield setting("in batches of 4 images with AdamW", HOW)
    yield setting("on the 32 validation images", "the data")
    yield setting("with all classes labelled (128 images)", "the data")
    names = {
        "stock": "random weights, bias of a rare class (Ultralytics)",
        "zero": "no weights, bias of a rare class",
        "mean": "mean weights of the old classes, bias of a rare class",
        "mean_bias": "mean weights and biases of the old classes (used)",
    }
    rows: dict[str, list[dict[str, Any]]] = {how: [] for how in names}
    for row in found["starts"]:
        rows[row["start"]].append(row)
    lines = []
    for how, name in names.items():
        loss, new, old = ([mean(each) for each in zip(*(row[key] for row in rows[how]), strict=True)] for key in _KEYS)
        lines.append([name, list_of("{:.3f}", loss), list_of("{:.3f}", new), say("{:.3f}", old[-1])])
    yield table(
        "| start | classification loss, epochs 1, 2, 3 | AP of the new classes, epochs 1, 2, 3 "
        "| AP of the old classes, epoch 3 |",
        lines,
    )
    for used, stock in zip(rows["mean_bias"], rows["stock"], strict=True):  # for both seeds, in all three epochs
        assert all(a > b for a, b in zip(used["new_ap"], stock["new_ap"], strict=True))
    yield setting("four epochs on 48 images in which only", "the data")
    assert found["replay_epochs"] == 4
    lines = []
    for fraction in (0, 0.3, 0.5):
        each = [row for row in found["replay"] if row["replay_fraction"] == fraction]
        cells = [say("{:.3f}", mean(row[key][1] for row in each)) for key in ("old_before", "old_after")]
        lines.append([str(fraction or "without `replay`"), *cells])
    yield table("| `replay_fraction` | AP of the old classes before | after |", lines)
    yield setting("The old images are the 128 training images", "the data")
    highest = max(row["new_after"][1] for row in found["replay"])
    yield sentence("AP was at most {:.3f} with and without `replay`", highest)


_KEYS = ("cls_loss", "new_ap", "old_ap")


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
    yield setting("chosen for 64 images", "nbs")
    yield sentence("in place of {} or {:,}", updates["demo", "s", "stock"], updates["demo", "n", "stock"])
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


@measured("Trainings with their loaders")
def trainings() -> Iterator[Passage]:
    """Yield the passages on trainings up to their second epoch, Ultralytics' and this package's in turn."""
    files = {
        "training": "JPEG files",
        "training_first_epoch": "JPEG files, later machine",
        "training_four_cores": "JPEG files, 4 cores",
        "training_ram": "`cache=ram`",
    }
    lines, longer = [], {}
    for name, source in files.items():
        found = result(name)
        rows = {(row["model"], row["round"], row["variant"]): row for row in found["rows"]}
        assert {row["batches"] for row in found["rows"]} == {60}
        for ratio in found["ratios"]:
            model, round_ = ratio["model"], ratio["round"]
            stock, ours = (rows[model, round_, who] for who in ("stock", "ours"))
            longer[name, model, round_] = ratio["first_epoch_longer_s"]
            speeds = [say("{:,.0f}", row["images_per_s"]) for row in (stock, ours)]
            pairs = [
                " → ".join(say(template, row[key]) for row in (stock, ours))
                for key, template in (
                    ("wait_percent", "{:.0f} %"), ("gpu_percent", "{:.0f} %"), ("first_epoch_s", "{:.1f}"),
                )
            ]  # fmt: skip
            again = ", again" if round_ else ""
            lines.append([f"{model.upper()}, {source}{again}", *speeds, say("{:.2f}", ratio["ratio"]), *pairs])
    yield setting("one NVIDIA H200 with 16 cores", "the machine")
    yield setting("640 pixels, batches of 128 with Ultralytics' default augmentation, 8 workers", HOW)
    yield setting("60 batches are measured", "asserted above")
    header = "| | Ultralytics, images/s | this package | ratio | waits for data | GPU busy | first epoch, s |"
    yield table(header, lines)
    ours_ = [(name, row) for name in files for row in result(name)["rows"] if row["variant"] == "ours"]
    augmenting = {(row["model"], name, row["round"]): row["augment_ms_per_image"] for name, row in ours_}
    stayed = ("m", "training", 0), ("s", "training_ram", 0), ("m", "training_ram", 0)
    on_host = [augmenting.pop(key) for key in stayed]
    moved = augmenting.values()
    yield sentence("augmentation took {:.1f} to {:.1f} ms of an image", min(moved), max(moved))
    yield sentence("but {:.1f} ms for M from files, and {:.1f} and {:.1f} ms for S and M from", *on_host)
    cold = [longer.pop(key) for key in (("training_first_epoch", "n", 0), ("training_ram", "m", 0))]
    yield sentence("this takes {:.0f} to {:.0f} s more than Ultralytics' first epoch", *sorted(cold))
    once = longer.pop(("training", "n", 0))
    yield sentence("N from files took {:.1f} s longer once, and {:.1f} s", once, longer["training_first_epoch", "n", 1])
    yield setting("the aim of 3 s", "a target")
    yield sentence("from {:.1f} s less to {:.1f} s longer", -min(longer.values()), max(longer.values()))


@measured("The inspection line")
def line() -> Iterator[Passage]:
    """Yield the passages on the story of the inspection line."""
    found = result("line")
    told, plain = found["watch"], found["without_replay"]
    asked, table_of = told["arguments"], {"watch": told["table"], "plain": plain["table"]}
    yield setting("YOLOv12-N at 320 pixels", HOW)
    yield sentence("Then {:,} labelled images of a new", told["images"])
    yield sentence("The watch trains {} epochs in batches of {} images", asked["epochs"], asked["batch"])
    yield sentence("`replay_fraction={}`, under a limit of 32 GiB", asked["replay_fraction"])
    assert told["limit_mib"] == 32 * 1024
    assert told["promoted"]
    assert all(found["holds"].values())
    assert not plain["table"]["would_be_promoted"]
    yield table(
        "| | AP of the old classes before | after | AP of the new classes | promoted |",
        [
            [name, *(say("{:.3f}", row[key]) for key in ("old_before", "old_after", "new_after")), promoted]
            for name, row, promoted in (
                ("`yolov12 watch`", table_of["watch"], "yes"),
                ("the same training without `replay` and undisturbed", table_of["plain"], "it would not be"),
            )
        ],
    )
    yield setting("on 200 boards of the line", "the data")
    connector, forgotten = (
        next(row for row in each["classes"] if row["name"] == "connector") for each in table_of.values()
    )
    fall = max(told["table"]["classes"], key=lambda row: (row["serving"] or 0) - row["candidate"])
    assert fall is connector
    yield sentence("The `margin` by which a class may fall is {}", asked["margin"])
    yield sentence("from {:.3f} to {:.3f}", connector["serving"], connector["candidate"])
    yield sentence("There, `connector` fell to {:.3f}", forgotten["candidate"])
    yield sentence("The kill cost {:.1f} s", told["seconds_lost_to_the_kill"])
    yield sentence("The training went on {} updates before", told["killed_after_update"] - told["resumed_at_update"])
    yield sentence("made all {} updates", told["updates"])
    assert (told["updates"], told["images_lost"], told["out_of_memories"]) == (told["updates_expected"], 0, 0)
    budget = told["budget_min_mib"], told["budget_max_mib"], told["peak_max_mib"]
    yield sentence("The budget was between {:,.0f} and {:,.0f} MiB, and the highest peak {:,.0f} MiB", *budget)
    yield sentence("Micro-batches had {} to {} images", told["micro_batch_min"], told["micro_batch_max"])
