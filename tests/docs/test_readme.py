"""README.md is short, its figures are those of the JSON files, and README.zh-CN.md says the same."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def parts(file):
    """Headings with their levels, code blocks without comments, links, and the numbers of each row of a table."""
    text = file.read_text("utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    code = [(kind, [re.sub(r"\s*# .*", "", line) for line in block.splitlines()]) for kind, block in blocks]
    links = re.findall(r"\]\(([^)]+)\)", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code": code,
        "links": sorted(link for link in links if not link.startswith("README")),
        "figures": [sorted(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", row))) for row in rows],
    }


@pytest.mark.parametrize("kind", ["headings", "code", "links", "figures"])
def test_both_languages_say_the_same(kind):
    assert parts(CHINESE)[kind] == parts(ENGLISH)[kind]


@pytest.mark.parametrize("file", [ENGLISH, CHINESE], ids=lambda file: file.name)
def test_it_is_short_and_the_other_language_is_one_click_away(file):
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 130
    other = CHINESE if file == ENGLISH else ENGLISH
    assert f"]({other.name})" in text
    assert file != ENGLISH or "emory-aware scheduling (MAS)" in text


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def at(rows, gib):
    return next(row["images_per_s"] for row in rows if row["limit_gib"] == gib)


def steps(variant, key):
    rows = results("attention")["steps"]
    return fmean(row[key] for row in rows if row["variant"] == variant and not row["deterministic"])


def four(who):
    return next(
        row["images_per_s"] for row in results("ranks_four")["speed"]["rows"] if (row["who"], row["gpus"]) == who
    )


def graph(share):
    rows = results("export")["agree"]
    (found,) = (
        r for r in rows if (r["model"], r["imgsz"], r["dynamic"], r["share"]) == ("yolov12m", 1280, False, share)
    )
    return found["planned_bytes"] / 2**20


def curve(scale, gib):
    found = results("checkpointing")
    return [at(found[f"ours-{scale}"], gib), at(found[f"stock-{scale}"], gib)]


def dense(key):
    found = results("dense")["dense"]
    return [found["ours"][key], found["stock"][0][key]]


def figures():
    """What each row of the table of figures has to say, as it is written there."""
    memory = results("memory")
    failures = memory["failures"]["disturbed"]
    worst = max(limit["prediction"]["max_percent"] for limit in memory["limits"].values())
    numbers = [
        *(curve("s", 4), curve("s", 16), curve("s", 80), curve("x", 8)),
        *(dense("images_per_s"), dense("peak_sd_mib")),
        [steps(variant, "images_per_s") for variant in ("sdpa", "stock")],
        [steps(variant, "peak_mib") for variant in ("sdpa", "stock")],
        [four(("ours", 4)), four(("stock", 4))],
        [failures["updates"]],
    ]
    assert (failures["steps"], failures["failures_injected"], failures["images_lost"]) == (200, 53, 0)
    texts = [[f"{number:,.0f}" for number in row] for row in numbers]
    texts.append([f"{worst:.1f} %"])
    texts.append([f"{memory['gradient']['relative_difference']['limit, fp32']:.1e}".replace("e-0", "e-")])
    texts.append([f"{graph(share):,.0f}" for share in (0.5, 1.0)])
    return texts


def test_figures_are_those_of_the_data():
    table = ENGLISH.read_text("utf-8").partition("## Figures")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    told = [[cell for cell in row[1:3] if cell] for row in rows[1:]]
    assert told == figures()
    for row in rows[1:]:
        (link,) = re.findall(r"\]\(([^)]+)\)", row[3])
        assert re.fullmatch(r"benchmarks/results/\w+\.json", link)


def test_the_picture_is_of_the_run_that_is_described():
    neighbour = results("memory")["neighbour"]
    ours, stock = neighbour["ours"], neighbour["stock"]
    for file, batch, updates in (
        (ENGLISH, "batch {}, one H200", "all {} updates"),
        (CHINESE, "batch {}，一块 H200", "{} 次参数更新全部"),
    ):
        text = " ".join(file.read_text("utf-8").split())
        assert batch.format(neighbour["batch"]) in text
        assert updates.format(ours["summary"]["updates"]) in text
    assert ours["summary"]["updates"] == ours["summary"]["updates_expected"]
    assert ours["summary"]["out_of_memories"] == 0
    sizes = {max(map(int, row["micro_batches"].split())) for row in ours["rows"][4:]}  # after the start
    assert sizes == {256, 512}
    assert "Reducing to batch=256" in stock["out_of_memory_lines"][0]


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.name)
def test_every_result_says_how_it_was_made(file):
    text = file.read_text()
    commands = re.findall(r'"command": "([^"]+)"', text)
    assert commands
    for command in commands:
        script = re.match(r"python (-m )?([\w./]+)|(scripts/\w+\.sh)", command)
        name = script[3] or (f"{script[2].replace('.', '/')}" if script[1] else script[2])
        assert (ROOT / name).exists() or name == "pytest", command


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ENGLISH]


def test_every_result_is_explained_somewhere():
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"benchmarks/results/{file.name}" in text, file.name
