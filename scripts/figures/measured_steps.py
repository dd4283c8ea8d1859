"""Single steps in docs/reference/measurements.md: attention, the engine, checkpoint plans, exactness, kernels."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.checkpointing import SETTLED, settled
from scripts.figures.pages import Passage, result, say, section, sentence, setting, table

measured = functools.partial(section, "docs/reference/measurements.md")
HOW = "how it was measured"
LIMITS = (4, 8, 12, 16, 24, 40, 80)
CURVES = "| limit, GiB | ours | Ultralytics 8.4.190 | all layers recomputed | ours ÷ stock | ours ÷ all |"


def list_of(template: str, values: Iterable[Any]) -> str:
    """Join formatted values by commas."""
    return ", ".join(say(template, value) for value in values)


@measured("Attention")
def attention() -> Iterator[Passage]:
    """Yield the passages on attention back ends."""
    found = result("attention")
    names = {"stock": "stock", "sdpa": "PyTorch's attention", "flash": "flash-attn"}

    def of(rows: list[dict[str, Any]], variant: str, deterministic: bool, key: str) -> list[float]:
        return [row[key] for row in rows if (row["variant"], row["deterministic"]) == (variant, deterministic)]

    steps, over = functools.partial(of, found["steps"]), functools.partial(of, found["ratios"])
    yield setting("400 and 1600 tokens and 4 heads of 32 channels", HOW)
    yield setting("A step is the forward pass, the loss and the backward pass at 640", HOW)
    yield setting("batch 128, in fp16 autocast and channels_last, with 25 random boxes per image", HOW)
    yield setting("medians of 20 steps, after 5 steps", HOW)
    rows = []
    for deterministic, variant in itertools.product((False, True), names):
        ratios = over(variant, deterministic, "images_per_s_over_stock")
        rows.append(
            [
                names[variant] + ", deterministic" * deterministic,
                "1, 2",
                list_of("{:.0f}", steps(variant, deterministic, "images_per_s")),
                list_of("{:.3f}", ratios),
                say("{:,.0f}", statistics.mean(steps(variant, deterministic, "peak_mib"))),
                say("{:.3f}", statistics.mean(over(variant, deterministic, "peak_over_stock"))) if ratios else "",
            ]
        )
    yield table("| | round | images/s | ÷ stock | peak MiB | ÷ stock |", rows)
    yield table("| back end | fp16 | bf16 | fp32 | backward repeats bit for bit |", _accuracy(found["accuracy"]))
    pairs = [steps(name, each, "images_per_s") for name in ("flash", "sdpa") for each in (False, True)]
    off = max(abs(a / b - 1) for a, b in zip(pairs[0] + pairs[1], pairs[2] + pairs[3], strict=True))
    yield sentence("they are within {:.1f} % of each other", 100 * off)
    yield setting("only for head dimension 32 and compute capability 9.0", "the build")
    speeds = {name: [statistics.mean(steps(name, each, "images_per_s")) for each in (True, False)] for name in names}
    yield sentence(
        "Deterministic mode makes stock {:.0f} % slower, and this package {:.0f} % with PyTorch's attention and {:.0f} "
        "% with flash-attn",
        *(100 * (1 - slow / fast) for slow, fast in speeds.values()),
    )


def _accuracy(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    names = {
        "math": "plain maths",
        "sdpa": "PyTorch's attention",
        "sdpa_deterministic_flash": "this package, deterministic mode, PyTorch's flash kernel",
        "sdpa_deterministic_efficient": "this package, deterministic mode, PyTorch's memory-efficient kernel",
        "flash_attn": "flash-attn",
    }
    for backend, name in names.items():
        mine = [row for row in rows if row["backend"] == backend]
        worst = []
        for dtype in ("torch.float16", "torch.bfloat16", "torch.float32"):
            errors = [max(row["error_out"], row["error_grad"]) for row in mine if row["dtype"] == dtype]
            worst.append(say("{:.0e}", max(errors)) if errors else "")
        repeats = "yes" if all(row["backward_repeats_bit_for_bit"] for row in mine) else "no"
        other = [row["backward_repeats_bit_for_bit"] for row in rows if row["backend"] == f"{backend}_deterministic"]
        yield [name, *worst, f"{repeats}; yes with `deterministic=True`" if other and all(other) else repeats]


def sizes(row: dict[str, Any]) -> list[int]:
    """Return the micro-batches of a row of memory.csv."""
    return [int(size) for size in row["micro_batches"].split()]


def stock_peak_mib() -> tuple[float, float]:
    """Return the peak of a step of stock, with YOLO12-S at 640: MiB with no image, and for each image."""
    steps = {row["batch"]: row["peak_mib"] for row in result("limits_h200")["stock-s"]}
    least, most = min(steps), max(steps)
    each = (steps[most] - steps[least]) / (most - least)
    return steps[most] - most * each, each


@measured("The memory-aware step")
def memory() -> Iterator[Passage]:
    """Yield the passages on the engine's step."""
    found = result("memory")
    yield setting("where 5 % of the images contain 160 to 330 objects", "the data")
    yield setting("single steps of YOLOv12-S at 640", HOW)
    yield from _limits(found["limits"])
    yield from _gradient(found["gradient"])
    ours, stock = found["neighbour"]["ours"], found["neighbour"]["stock"]
    taken = [100 * max(fraction for _, fraction in each["card_taken"]) for each in (ours, stock)]
    once = [max(sizes(row)) for row in ours["rows"]]
    yield sentence(
        "For {} seconds, another process takes and releases up to {:.0f} % of the card", ours["seconds"], taken[0]
    )
    yield sentence("This package made all {} updates, and no allocation failed", ours["summary"]["updates"])
    assert ours["summary"]["out_of_memories"] == 0
    assert set(once[4:]) == {256, 512}
    assert [sizes(row)[0] for row in ours["rows"][:3]] == [32, 128, 256]
    yield setting("It ran 32 and 128 images at once in the first two steps, then 256", "asserted above")
    yield sentence("the engine ran 512 at once, for {} steps", once.count(512))
    yield setting("and the engine went back to 256", HOW)
    budgets = [float(row["budget_mib"]) for row in ours["rows"]]
    needed = max(float(row["peak_mib"]) for row in ours["rows"])
    last = max(index for index, size in enumerate(once) if size == 512)
    roomy = sum(budget > needed for budget in budgets[last + 1 :])
    yield sentence("there was room for 512 again for {} steps, in which it stayed at 256", roomy)
    yield sentence("each further image, so {} images need more", found["neighbour"]["batch"])
    yield sentence("need {:.0f} MiB for", stock_peak_mib()[1])
    yield sentence("The predicted peaks were {:.1f} % off (median)", ours["summary"]["prediction_error_percent"])
    assert "Reducing to batch=256" in stock["out_of_memory_lines"][0]
    yield setting("so it continued with 256", HOW)
    yield sentence("It ran for {} seconds, in which the other process took up to {:.0f} %", stock["seconds"], taken[1])
    parts = found["measured_on"]
    assert all(parts[part]["date"] == "2026-11-30" for part in ("limits", "failures", "overhead"))
    commits = {part: head.get("commit") for part, head in parts.items()}
    assert commits["failures"] == commits["overhead"]
    words = "at commit {}, `failures` and `overhead` at {}, `neighbour`"
    yield sentence(words, commits["limits"], commits["overhead"])
    yield sentence("`first_times` of 2026-12-01, at commit {}. The parts", commits["first_times"])
    assert {head["device"] for head in parts.values()} == {"NVIDIA H200"}
    first, second = ([row[key] for row in found["first_times"]] for key in ("first_s", "second_s"))
    yield sentence("takes {:.1f} to {:.1f} seconds, because cuDNN", min(first), max(first))
    yield sentence("The second one takes {:.1f} seconds", statistics.median(second))
    disturbed, calm = found["failures"]["disturbed"], found["failures"]["undisturbed"]
    yield sentence("{} steps of {:.0f} images", disturbed["steps"], disturbed["images"] / disturbed["steps"])
    assert disturbed["images_lost"] == 0
    yield sentence(
        "{} failures were injected, and all {} updates were made with all {:,} images. The summary of the run counts "
        "{} failures",
        *(disturbed[key] for key in ("failures_injected", "updates", "images", "out_of_memories")),
    )
    yield sentence("The last loss was {:.0f}", disturbed["loss"][1])
    yield sentence("without failures, it was {:.0f}", calm["loss"][1])
    yield from _overhead(found["overhead"])


def _limits(found: dict[str, Any]) -> Iterator[Passage]:
    rows, same, other, medians = [], [], [], []
    for limit, run in found.items():
        errors = dict(run["prediction"])
        assert errors.pop("all")["steps"] == len(run["rows"])
        medians.append(errors["same"]["median_percent"])
        same.append(abs(errors.pop("same")["worst_percent"]))
        other.append(max(abs(case["worst_percent"]) for case in errors.values()))
        summary = run["summary"]
        assert summary["images_lost"] == 0
        assert summary["updates"] == summary["updates_expected"]
        assert summary["out_of_memories"] == sum("out-of-memory in a capture" in row["events"] for row in run["rows"])
        peak = say("{:.1f}", summary["peak_max_mib"] / 1024)
        least, most = summary["micro_batch_min"], summary["micro_batch_max"]
        at_once = f"{least} to {most}" if least < most else str(most)
        errors_ = [say("{:.1f} %", same[-1]), say("{:.1f} %", other[-1])]
        rows.append([limit, at_once, peak, *errors_, str(summary["out_of_memories"])])
    free_mib = min(float(row["free_mib"]) for run in found.values() for row in run["rows"])
    yield sentence("where other processes left as little as {:.1f} GiB free", free_mib / 1024)
    yield table(
        "| `mem_limit` | images at once | peak, GiB | largest error of a predicted peak, run as before "
        "| others | failures |",
        rows,
    )
    yield sentence("`batch=256`, {} updates and a validation", found["8 GiB"]["summary"]["updates"])
    yield sentence("off by {:.3f} to {:.1f} % (median of each run)", min(medians), max(medians))
    yield sentence("and by at most {:.1f} %, in the step whose capture failed", max(same))
    yield sentence("In the other steps, they were off by up to {:.1f} %", max(other))


def _gradient(found: dict[str, Any]) -> Iterator[Passage]:
    off, runs = found["relative_difference"], {name: run["micro_batches"] for name, run in found["runs"].items()}
    small = "16 micro-batches of 16"
    assert runs["8 GiB"] == runs["8 GiB, other layout"] == runs["12 GiB, fp32"] == [16] * 16
    assert (runs["40 GiB"], runs["60 GiB, fp32"]) == ([128] * 2, [80, 80, 96])
    yield setting("one batch of 256 images, with BatchNorm groups of 16 and the weights after 60 steps", HOW)
    yield table(
        "| gradient a | gradient b | relative difference |",
        [
            [
                f"fp16, {small} (limit of 8 GiB)",
                "fp16, 2 micro-batches of 128 (limit of 40 GiB)",
                say("{:.3f}", off["limit"]),
            ],
            [f"fp16, {small}, contiguous", f"fp16, {small}, channels_last", say("{:.3f}", off["rounding"])],
            [f"fp16, {small}", f"fp32, {small}", say("{:.2f}", off["fp16 against fp32"])],
            [f"fp32, {small}", "fp32, micro-batches of 80, 80 and 96", say("{:.1e}", off["limit, fp32"])],
        ],
    )
    yield setting("In float64, the tests allow 2e-5", "the bound of a test")


def _overhead(found: list[dict[str, Any]]) -> Iterator[Passage]:
    rows = {(row["micro_batch"], row["bn_group"]): row for row in found}
    order = ((256, 256), (256, 32), (128, 32), (64, 32), (32, 32))
    yield setting("A step has 256 images and consists of", HOW)
    yield table(
        "| micro-batch | BatchNorm group | ÷ bare loop | rounds, sorted |",
        [
            [
                *map(str, key),
                say("{:.3f}", rows[key]["engine_over_bare"]),
                list_of("{:.3f}", sorted(rows[key]["rounds"])),
            ]
            for key in order
        ],
    )
    each = {micro: rows[micro, 32]["bare_ms"] * micro / 256 for micro in (32, 64, 128)}
    yield sentence(
        "The bare loop takes {:.0f} ms for 32 images, {:.0f} ms for 64 and {:.0f} ms for 128", *each.values()
    )


def limits_of(scale: str) -> list[dict[str, Any]]:
    """Return the rows of limits_h200.json at each limit: `gib`, `ours`, `stock` and `all`.

    Args:
        scale: `s` or `x`.
    """
    found = result("limits_h200")
    at = {who: {row["limit_gib"]: row for row in found[f"{who}-{scale}"]} for who in ("ours", "stock", "all")}
    return [{"gib": gib, **{who: rows[gib] for who, rows in at.items()}} for gib in LIMITS]


def _cells(at: dict[str, Any]) -> list[str]:
    """Return the cells of a line of `CURVES`."""
    ours, others = at["ours"], (at["stock"], at["all"])
    speeds = [say("{:,.0f} (at {})", row["images_per_s"], row.get("batch", row.get("micro_batch")))
              for row in (ours, *others)]  # fmt: skip
    return [str(at["gib"]), *speeds, *(say("{:.2f}", ratio(ours, row)) for row in others)]


def ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
    """Return how many times as fast a row is as another one."""
    return row["images_per_s"] / base["images_per_s"]


@measured("Images a second against memory")
def limits() -> Iterator[Passage]:
    """Yield the passages on images/s at seven limits."""
    found = result("limits_h200")
    curves = {scale: {at["gib"]: at for at in limits_of(scale)} for scale in "sx"}
    every = [at for curve in curves.values() for at in curve.values()]
    rows = [at[who] for at in every for who in ("ours", "stock", "all")]
    ours = {scale: {gib: at["ours"] for gib, at in curve.items()} for scale, curve in curves.items()}
    made_alike("all", *rows)
    assert all(row["images_per_update"] == 256 for row in rows)
    assert not any(row["failures"] or row["steps_in_smaller_groups"] for row in rows if "steps" in row)
    yield sentence("at commit {}, on one host", found["commit"])
    yield setting("`--limit-seconds 60` for X at 4 GiB", HOW)
    yield setting("Images have 640 pixels", HOW)
    yield setting("all variants update the weights once for 256 images", HOW)
    yield setting('"Ours" is this package at batch 256', HOW)
    lengths = [len(row["steps"]) for curve in ours.values() for row in curve.values()]
    yield setting("(25 seconds after the first step, 60 for X at 4 GiB, and", HOW)
    yield sentence("which were {} to {} steps", min(lengths), max(lengths))
    reached = {scale: [gib for gib, row in curve.items() if settled(row["steps"])] for scale, curve in ours.items()}
    assert reached == {"s": list(LIMITS), "x": [4]}
    yield setting("at all limits for S and at 4 GiB for X", "limits")
    groups = {(scale, gib): row["bn_group"] for scale, curve in ours.items() for gib, row in curve.items()}
    small = [groups.pop(("x", gib)) for gib in (8, 4)]
    yield sentence("groups had {} images in ours, and {} and {} for X at 8 and 4 GiB", *set(groups.values()), *small)
    for scale, curve in curves.items():
        yield table(CURVES, map(_cells, curve.values()), after=f"YOLO12-{scale.upper()}:\n\n")
    over, share = ratio(ours["s"][16], curves["s"][16]["stock"]), ratio(ours["x"][16], ours["x"][80])
    assert over >= 2.5
    assert share < 0.8
    yield sentence("at 16 GiB, S has {:.2f} times the speed of stock", over)
    yield setting("(target 2.5: met)", "a target")
    yield sentence("X reaches {:.2f} of its own speed at 80 GiB", share)
    yield setting("(target 0.8: missed)", "a target")
    small, large = found["earlier"]["ours-x"]
    made_alike("16 and 80", small, large)
    yield sentence("It was {:.2f} at commit {}, on another host", ratio(small, large), small["commit"])
    for who, words in (
        ("stock", "Ours is {:.2f} to {:.2f} times as fast as stock"),
        ("all", "and {:.2f} to {:.2f} times as fast as all layers recomputed"),
    ):
        ratios = [ratio(at["ours"], at[who]) for at in every]
        assert min(ratios) > 1
        yield sentence(words, min(ratios), max(ratios))
    yield sentence("the second one at commit {}), stock had", found["earlier"]["ours-s"][-1]["commit"])
    yield from _hosts(found["earlier"], curves["s"])
    yield from _endings(ours)
    alike, other = graph_errors()
    yield sentence("are off by at most {:.2f} %", max(map(abs, alike)))
    yield sentence("The others are up to {:.1f} % too low", -min(other))
    yield sentence("or up to {:.1f} % too high", max(other))


def _hosts(earlier: dict[str, list[dict[str, Any]]], curve: dict[int, dict[str, Any]]) -> Iterator[Passage]:
    """Yield the passages on the speeds of S on other hosts."""

    def of(who: str, gib: int) -> list[dict[str, Any]]:
        rows = [row for row in earlier[f"{who}-s"] if row["limit_gib"] == gib]
        assert rows[-1]["commit"] == "4016c79"
        return rows

    for gib, words in (
        (8, "stock had {:.0f} and {:.0f} images/s at 8 GiB ({:.0f} here)"),
        (12, "{:.0f} and {:.0f} at 12 GiB ({:.0f} here)"),
        (16, "{:.0f} and {:.0f} at 16 GiB ({:.0f} here)"),
    ):
        yield sentence(words, *(row["images_per_s"] for row in of("stock", gib)), curve[gib]["stock"]["images_per_s"])
    for gib, words in (
        (12, "ours was {:.2f} and {:.2f} times as fast as stock at 12 GiB"),
        (16, "and {:.2f} and {:.2f} times at 16"),
    ):
        pairs = list(zip(of("ours", gib), of("stock", gib), strict=True))
        for pair in pairs:
            made_alike(gib, *pair)
        yield sentence(words, *(ratio(*pair) for pair in pairs))


def _endings(ours: dict[str, dict[int, dict[str, Any]]]) -> Iterator[Passage]:
    """Yield the passages on graphs, and on the pairs of micro-batch size and plan that the controller ended with."""
    slow, less, last = ours["s"][40], ours["s"][24], ours["x"][4]
    assert slow["plan"]["recompute"]
    assert slow["images_per_s"] < less["images_per_s"]
    tried = [step for step in slow["steps"] if step["micro_batch"] == 128 and step["replayed"]]
    assert tried
    assert not any(step["level"] for step in tried)
    yield setting("**S is slower at 40 GiB than at 24:**", "limits")
    lately = [256 / statistics.median(step["s"] for step in row["steps"][-SETTLED:]) for row in (slow, less)]
    yield sentence("those of the last 40 steps are {:,.0f} and {:,.0f}", *lately)
    usual = [step["s"] for step in slow["steps"][4:] if (step["micro_batch"], step["replayed"]) == (128, 0)]
    (replayed_s,) = {round(step["s"], 3) for step in tried if step["replayed"] == 2}
    yield setting("Graphs of 128 images without a plan were tried twice", "a micro-batch")
    yield setting("Since commit b1b6ff8, one that is captured again", "a commit")
    yield sentence("took {:.0f} ms, and those without them {:.0f} ms", 1e3 * replayed_s, 1e3 * statistics.median(usual))
    yield sentence(
        "it ended with micro-batches of {} and a checkpoint plan, at {:,.0f} images/s instead of {:,.0f}",
        *(slow["micro_batch"], slow["images_per_s"], less["images_per_s"]),
    )
    replayed = {scale: [gib for gib, row in rows.items() if row["replayed"]] for scale, rows in ours.items()}
    assert replayed == {"s": [4, 8, 12, 16, 24], "x": [4, 8, 12, 16, 40]}
    yield setting("for S from 4 to 24 GiB and for X from 4 to 16 and at 40 GiB", "limits at which the data has replays")
    assert all(step["replayed"] * last["micro_batch"] == 256 for step in last["steps"][1:])
    assert last["micro_batch"] == last["bn_group"]
    yield sentence("X at 4 GiB ran in micro-batches of {}, all of them as graphs", last["micro_batch"])


def graph_errors() -> tuple[list[float], list[float]]:
    """Return errors of predicted peaks in per cent, of steps like the two before and of others."""
    alike: list[float] = []
    other: list[float] = []
    for steps in (at["ours"]["steps"] for scale in "sx" for at in limits_of(scale)):
        ways = [tuple(step[key] for key in ("micro_batch", "level", "replayed")) for step in steps]
        for index, step in enumerate(steps):
            is_alike = index >= 2 and len(set(ways[index - 2 : index + 1])) == 1
            (alike if is_alike else other).append(100 * (step["predicted_mib"] / step["peak_mib"] - 1))
    return alike, other


def made_alike(limit: object, *rows: dict[str, Any]) -> None:
    """Refuse to compare rows of limits_h200.json that were measured on other cards, or at other commits.

    Args:
        limit: Limit of the rows in GiB, for the message.
        rows: The rows. Those of older files have no commit.

    Raises:
        AssertionError: The cards or the commits differ.
    """
    for key in ("device", "commit"):
        values = {str(row.get(key)) for row in rows}
        assert len(values) == 1, f"limits_h200.json, {limit} GiB: rows of several {key}s: {', '.join(sorted(values))}"


@measured("What plans free")
def freed() -> Iterator[Passage]:
    """Yield the passages on bytes that plans free."""
    found = result("checkpointing")["freed"]
    rows = []
    for name, each in itertools.groupby(found, lambda row: row["model"]):
        plans = list(each)
        assert len(plans) == 10
        label = f"{name[-1]}, {plans[0]['images']}" + " images" * (name == "yolov12n")
        kept = plans[0]["kept_mib"][1]
        rows.append(
            [
                label,
                say("{:,.0f}", kept),
                say("{:,.0f}", plans[-1]["measured_mib"]),
                say("{:.3f} %", max(abs(plan["off_percent"]) for plan in plans)),
                say("{:.1f} s", plans[0]["profile_s"]),
                say("{:.1f} s", plans[0]["ladder_s"]),
            ]
        )
    yield setting("Images have 640 pixels", HOW)
    yield table(
        "| | kept, MiB | freed by the last plan, MiB | largest prediction error | time to profile | time to plan |",
        rows,
    )
    peak = max(abs(100 * (row["predicted_peak_mib"] / row["measured_peak_mib"] - 1)) for row in found)
    yield sentence("the largest prediction error is {:.1f} %", peak)


@measured("Averaging losses")
def averaging() -> Iterator[Passage]:
    """Yield the passages on the error of averaged losses."""
    yield setting("YOLO12-N at 192 pixels", HOW)
    yield setting("two micro-batches of 4 and into eight of 1", HOW)
    yield setting("a sum of target scores below 1 by 1", "Ultralytics' rule")
    yield setting("the sums of the micro-batches are above 1", "Ultralytics' rule")


def averaging_table() -> Passage:
    """Return the table of errors in docs/explanation/exactness.md."""
    rows = {(row["steps_before"], row["micro_batch"], row["dtype"]): row for row in result("exactness")["rows"]}
    cells = []
    for steps, size in itertools.product((0, 150), (4, 1)):
        single, double = rows[steps, size, "torch.float32"], rows[steps, size, "torch.float64"]
        cells.append(
            [
                f"after {steps} steps" if steps else "before training",
                {4: "two of 4", 1: "eight of 1"}[size],
                say("{:.0f} %", 100 * single["average"]),
                say("{:.0e}", single["engine"]),
                say("{:.0e}", double["engine"]),
            ]
        )
    return table("| weights | split | averaging | the engine, fp32 | the engine, float64 |", cells)
