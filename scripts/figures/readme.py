"""Figures of README.md and README.zh-CN.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from scripts.figures.cards import README, readme_rows
from scripts.figures.exports import augmentation
from scripts.figures.measured_accuracy import Longer
from scripts.figures.measured_steps import graph_errors, limits_of, list_of, made_alike, sizes, stock_peak_mib
from scripts.figures.pages import Passage, result, say, section, sentence, setting, table

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
# First cell of each row in both languages, in the order of `_rows`.
LABELS = {
    "training steps of YOLO12-S, 640, batch 256, limits of 4, 16 and 80 GiB, images/s": (
        "YOLO12-S 训练步，640，batch 256，显存限制 4、16 和 80 GiB，图像/秒"
    ),
    "the same, YOLO12-X": "同上，YOLO12-X",
    **README,
    "training of YOLO12-N, S and M from JPEG files, 640, batch 128, 8 workers, from the second epoch on, images/s": (
        "从 JPEG 文件训练 YOLO12-N、S 和 M，640，batch 128，8 个 worker，从第二个 epoch 起，图像/秒"
    ),
    "training on four GPUs, batch 512, images in memory and not augmented, images/s": (
        "四卡训练，batch 512，图像在内存中且不做增强，图像/秒"
    ),
    "updates made in 200 steps with 53 injected allocation failures": "200 步中注入 53 次分配失败，完成的参数更新次数",
    "largest error of a predicted peak, limits from 4 to 80 GiB: in steps like the two before, in others": (
        "显存峰值预测的最大误差，4 到 80 GiB 的限制：与前两步运行方式相同时、其他时候"
    ),
    "relative difference between the gradients of two splits of a batch (2026-11-24): in fp32, in fp16 (the default)": (
        "同一个 batch 按两种方式拆分，梯度的相对差（2026-11-24）：fp32、fp16（默认）"
    ),
    "exported graph of YOLOv12-M at 1280, memory of its tensors, MiB": (
        "导出的 YOLOv12-M（1280）计算图中张量的内存，MiB"
    ),
}


def _rows() -> Iterator[tuple[str, str, list[str]]]:
    """Yield each row of the table: the card, the names of JSON files, and the figures, this package's first."""
    memory = result("memory")
    for scale in "sx":
        at = [each for each in limits_of(scale) if each["gib"] in (4, 16, 80)]
        both = [[each[who] for each in at] for who in ("ours", "stock")]
        made_alike("4, 16 and 80", *both[0], *both[1])
        speeds = [list_of("{:,.0f}", (row["images_per_s"] for row in rows)) for rows in both]
        yield both[0][0]["device"], "limits_h200", speeds
    cards = result("cards"), result("cards_100")
    (device,) = {head["device"] for found in cards for head in found["measured_on"].values()}
    yield from ((device, *row) for row in readme_rows(*cards))
    whole = result("training")
    speed = {(row["variant"], row["model"]): row["images_per_s"] for row in whole["rows"]}
    speeds = [list_of("{:,.0f}", (speed[who, scale] for scale in "nsm")) for who in ("ours", "stock")]
    yield whole["device"], "training", speeds
    ranks = result("ranks_four")
    assert augmentation(ranks["speed"]) == "not augmented", "the label of the row says otherwise"
    four = {row["who"]: row["images_per_s"] for row in ranks["speed"]["rows"] if row["gpus"] == 4}
    card = ranks["measured_on"]["speed"]["device"].replace("NVIDIA", "4 ×")
    yield card, "ranks_four", [say("{:,.0f}", four[who]) for who in ("ours", "stock")]
    (device,), failures = {head["device"] for head in memory["measured_on"].values()}, memory["failures"]["disturbed"]
    assert (failures["steps"], failures["images_lost"]) == (200, 0)
    assert failures["failures_injected"] == failures["out_of_memories"] == 53
    yield device, "memory", [str(failures["updates"]), ""]
    alike, other = (max(map(abs, errors)) for errors in graph_errors())
    yield result("limits_h200")["device"], "limits_h200", [say("{:.2f} %, {:.1f} %", alike, other), ""]
    off = memory["gradient"]["relative_difference"]
    yield device, "memory", [say("{:.1e}, {:.3f}", off["limit, fp32"], off["limit"]), ""]
    graphs = {
        row["share"]: row["planned_bytes"] / 2**20
        for row in result("export")["agree"]
        if (row["model"], row["imgsz"], row["dynamic"]) == ("yolov12m", 1280, False)
    }
    yield "CPU", "export", [say("{:,.0f}", graphs[share]) for share in (0.5, 1.0)]


def _table(header: str, labels: Iterable[str], comma: str) -> Passage:
    rows = []
    for label, (card, files, figures) in zip(labels, _rows(), strict=True):
        card = re.sub("NVIDIA | 80GB HBM3", "", card)
        links = [f"[JSON](benchmarks/results/{file}.json)" for file in files.split()]
        rows.append([label, *figures, comma.join([card, *links])])
    return table(header, rows)


@section(ENGLISH, "Figures")
def figures() -> Iterator[Passage]:
    """Yield the table."""
    yield _table("| | this package | Ultralytics | card, data |", LABELS, ", ")
    yield setting("(with 2.3.1, off)", "a version")


@section(CHINESE, "测量数据")
def chinese_figures() -> Iterator[Passage]:
    """Yield the table."""
    yield _table("| | 本项目 | Ultralytics | 显卡，数据 |", LABELS.values(), "，")
    yield setting("指 8.4.190", "a version")
    yield setting("2.3.1 没有", "a version")


CARD_MIB = 139 * 1024
"""Memory of an H200."""


@section(ENGLISH, "")
def picture() -> Iterator[Passage]:
    """Yield the run that the picture shows."""
    batch, taken, updates, whole = _run()
    words = "(YOLO12-S, batch {}, one H200), another process took and released up to {:.0f} %"
    yield sentence(words, batch, taken)
    yield sentence("The engine ran all {} images at once in {} steps, and 256 at once", batch, whole)
    yield sentence("its {} images do not fit on this GPU", batch)
    yield sentence("It made all {} updates with the batch of {}", updates, batch)


@section(CHINESE, "")
def chinese_picture() -> Iterator[Passage]:
    """Yield the run that the picture shows."""
    batch, taken, updates, whole = _run()
    yield sentence("（YOLO12-S，batch {}，一块 H200）运行时，另一个进程随机占用和释放最多 {:.0f} %", batch, taken)
    yield sentence("引擎在 {} 步中一次运行全部 {} 张图像；显存被占用时一次运行 256 张", whole, batch)
    yield sentence("它的 {} 张图像在这块 GPU 上放不下", batch)
    yield sentence("{} 次参数更新全部按设定的 batch 完成", updates)


@section(ENGLISH, "What is not verified", is_whole=False)
def not_verified() -> Iterator[Passage]:
    """Yield with which code GPUs ran what, and how mAP differs from Ultralytics' in short trainings."""
    newest, steps, late, epochs, middle, early, passed, tests = _on_gpu()
    words = (
        "six longer trainings (commit {}), trainings in the memory of an A10 and an A100 and {} steps with injected "
    )
    yield sentence(words + "failures ({}), steps at seven limits, {} epochs", newest, steps, late, epochs)
    yield sentence("kernels compiled ahead ({}), and the smoke run ({}); the other", middle, early)
    yield sentence("([{} of {}](benchmarks/results/smoke.json) passed", passed, tests)
    yield setting("95 % intervals of the difference", "a confidence")
    yield from _accuracy(
        "schedule of {} images: `batch=256` is {:.3f} ± {:.3f} below Ultralytics with {}, and {:.3f} ± {:.3f} with",
        "an earlier run, cut off after {}, it differs from Ultralytics with `batch=256` by {:+.3f} ± {:.3f}",
        "contain zero (± {:.3f} to {:.3f} mAP, three seeds)",
        "they end lower by {:.2f} to {:.2f}",
    )


@section(CHINESE, "尚未验证", is_whole=False)
def chinese_not_verified() -> Iterator[Passage]:
    """Yield with which code GPUs ran what, and how mAP differs from Ultralytics' in short trainings."""
    newest, steps, late, epochs, middle, early, passed, tests = _on_gpu()
    words = "六次较长的训练（提交 {}）、显存相当于 A10 和 A100 的训练和注入分配失败的 {} 步（{}），"
    yield sentence(words + "七种显存限制下的训练步、{} 个 epoch", newest, steps, late, epochs)
    yield sentence("提前编译 kernel 的测试（{}），以及冒烟测试（{}）；其余", middle, early)
    yield sentence("（当时 {} 个中 [{} 个](benchmarks/results/smoke.json)通过", tests, passed)
    yield setting("差值在 95 % 区间内", "a confidence")
    yield from _accuracy(
        "按 {} 张图像的计划训练结束时，`batch=256` 比 Ultralytics 低 {:.3f} ± {:.3f}（其 batch 为 {}），"
        "学习率加倍后低 {:.3f} ± {:.3f}",
        "更早的一次 {} 张图像后中途停止的训练中，与 Ultralytics 的 `batch=256` 相差 {:+.3f} ± {:.3f}",
        "包含零（± {:.3f} 到 {:.3f} mAP）",
        "`batch=256` 时低 {:.2f} 到 {:.2f}",
    )


def _accuracy(small: str, large: str, same: str, short: str) -> Iterator[Passage]:
    found = Longer()
    seen = found.seen(found.settings["epochs"])
    yield sentence(small, seen, *found.below("256"), found.batch, *found.below("256lr"))
    yield sentence(large, found.seen(found.same_until), *found.to_the_same_batch())
    rows = [row for row in result("accuracy")["gpu"]["table"] if "against_stock" in row]
    widths = [row["against_stock"]["interval"] for row in rows if row["variant"] == "same"]
    yield sentence(same, min(widths), max(widths))
    lower = [-row["against_stock"]["difference"] for row in rows if row["variant"] != "same"]
    yield sentence(short, min(lower), max(lower))


def _on_gpu() -> tuple[str, int, str, int, str, str, int, int]:
    tests, limits, dense = result("smoke")["marked_gpu"], result("limits_h200"), result("cards_100")
    graphs, ahead = tests["graphs_of_2026_11_30"]["runs"], tests["kernels_ahead_of_2026_11_30"]["runs"]
    cards, memory = (result(name)["measured_on"] for name in ("cards", "memory"))
    trainings = result("accuracy")["measured_on"]["gpu_long_2"]
    (newest,) = {head["commit"] for head in (trainings, graphs[-1])}
    assert len([run for run in result("accuracy")["gpu_long_2"]["runs"] if "engine" in run]) == 6
    (late,) = {head["commit"] for head in (cards["a10"], cards["a100"], memory["failures"])}
    (middle,) = {head["commit"] for head in (limits["measured_on"]["ours-s"], dense["measured_on"]["t4"], ahead[-1])}
    assert len(limits["ours-s"]) == 7
    passed, failed = (tests["kernels_of_2026_11_29"][key] for key in ("passed", "failed"))
    steps = result("memory")["failures"]["disturbed"]["steps"]
    return newest, steps, late, dense["t4"]["epochs"], middle, graphs[0]["commit"], passed, passed + failed


def _run() -> tuple[int, float, int, int]:
    found = result("memory")["neighbour"]
    summary = found["ours"]["summary"]
    assert summary["updates"] == summary["updates_expected"]
    assert summary["out_of_memories"] == 0
    assert {max(sizes(row)) for row in found["ours"]["rows"][4:]} == {256, 512}  # after the start
    assert "Reducing to batch=256" in found["stock"]["out_of_memory_lines"][0]
    whole = sum(sizes(row) == [found["batch"]] for row in found["ours"]["rows"])
    without_images, each_image = stock_peak_mib()
    assert without_images + found["batch"] * each_image > 1.1 * CARD_MIB  # so not without the other process either
    return found["batch"], 100 * max(fraction for _, fraction in found["ours"]["card_taken"]), summary["updates"], whole
