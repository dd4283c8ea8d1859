"""Trainings and loaders in docs/reference/measurements.md; their accuracy is in another module."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from statistics import mean
from typing import Any

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
    graphs, *_, repeated, later, newest = found["graphs_of_2026_11_30"]["runs"]
    for run in (repeated, later, newest):
        assert (run["failed"], run["passed"]) == (0, graphs["passed"])
    failed, passed, again = found["kernels_ahead_of_2026_11_30"]["runs"]
    assert (failed["failed"], failed["commit"], passed["failed"]) == (1, graphs["commit"], 0)
    assert (again["failed"], again["commit"]) == (0, repeated["commit"])
    words = "Both passed at commit {}, too, and those of CUDA graphs at the commits {} and {} as well"
    yield sentence(words, again["commit"], later["commit"], newest["commit"])
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
    for mean_only, used in zip(rows["mean"], rows["mean_bias"], strict=True):
        assert all(a > b for a, b in zip(mean_only["new_ap"][1:], used["new_ap"][1:], strict=True))
    kept = {how: mean(row["old_ap"][-1] for row in each) for how, each in rows.items()}
    assert kept["stock"] > max(kept["mean"], kept["mean_bias"])
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
    yield sentence("The `margin` by which a class may fall was {}; with", asked["margin"])
    assert 0.02 < connector["serving"] - connector["candidate"] < asked["margin"]
    yield setting("with the default of 0.02, this candidate", "a default, asserted above")
    yield sentence("from {:.3f} to {:.3f}", connector["serving"], connector["candidate"])
    yield sentence("There, `connector` fell to {:.3f}", forgotten["candidate"])
    yield sentence("The kill cost {:.1f} s", told["seconds_lost_to_the_kill"])
    yield sentence("The training went on {} updates before", told["killed_after_update"] - told["resumed_at_update"])
    yield sentence("made all {} updates", told["updates"])
    assert (told["updates"], told["images_lost"], told["out_of_memories"]) == (told["updates_expected"], 0, 0)
    budget = told["budget_min_mib"], told["budget_max_mib"], told["peak_max_mib"]
    yield sentence("The budget was between {:,.0f} and {:,.0f} MiB, and the highest peak {:,.0f} MiB", *budget)
    yield sentence("Micro-batches had {} to {} images", told["micro_batch_min"], told["micro_batch_max"])
