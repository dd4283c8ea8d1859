"""Writes the README's table of what was verified where, from the records that scripts/smoke.sh made.

scripts/smoke.sh --record=benchmarks/results/verified_NAME.json     # on the machine, inside or outside of the image
python scripts/verified.py

A test fails if a table is out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
START, END = "<!-- Made by scripts/verified.py: do not edit. -->", "<!-- End -->"
# Column → first letters of the names of its tests.
TESTS = {
    "training, validation": ("test_trains", "test_validates"),
    "ONNX": ("test_onnx",),
    "flash-attn": ("test_the_flash_kernel",),
    "TensorRT": ("test_tensorrt",),
}
CHINESE = {
    "where": "环境",
    "training, validation": "训练、验证",
    "Docker image": "Docker 镜像",
    "Docker image on substitute bases": "替代基础镜像上的 Docker 镜像",
    "outside of the image": "镜像之外",
    "passed": "通过",
    "failed": "失败",
    "not run": "未运行",
    "not installed": "未安装",
}


def table(language: str, records: Mapping[str, Any]) -> str:
    """Format the records as a table in Markdown.

    Args:
        language: `en` or `zh`.
        records: Name of the file → what scripts/smoke.sh wrote into it.

    Returns:
        The table, with a row for each record.
    """
    words = CHINESE if language == "zh" else {}
    say = lambda text: words.get(text, text)  # noqa: E731
    rows = [["where", "PyTorch", *TESTS], ["---"] * (len(TESTS) + 2)]
    for file, record in sorted(records.items()):
        place, machine = _where(record["check"])
        link = f"[{say(place)}{'，' if words else ', '}{machine}](benchmarks/results/{file})"
        outcomes = [_outcome(record, column, say) for column in TESTS]
        rows.append([link, record["check"]["versions"]["torch"], *outcomes])
    return "\n".join(f"| {' | '.join(map(say, row))} |" for row in rows)


def replaced(text: str, made: str) -> str:
    """Return the text of a README with another table between the marks."""
    pattern = f"{re.escape(START)}\n.*?{re.escape(END)}"
    assert len(re.findall(pattern, text, re.DOTALL)) == 1, "the README has no marks for the table"
    return re.sub(pattern, lambda _: f"{START}\n\n{made}\n\n{END}", text, flags=re.DOTALL)


def read_records() -> dict[str, Any]:
    """Read the records. Returns name of the file → content."""
    return {file.name: json.loads(file.read_text("utf-8")) for file in RESULTS.glob("verified_*.json")}


def _where(check: Mapping[str, Any]) -> tuple[str, str]:
    gpus = [gpu["name"] for gpu in check["gpus"] if gpu["index"] is not None]
    if not check["image"]:
        place = "outside of the image"
    elif any(base.startswith("localhost/") for base in check["image"]["bases"].values()):
        place = "Docker image on substitute bases"
    else:
        place = "Docker image"
    return place, gpus[0] if gpus else "CPU"


def _outcome(record: Mapping[str, Any], column: str, say: Any) -> str:
    found = [outcome for test, outcome in record["outcomes"].items() if test.startswith(TESTS[column])]
    packages = {package["name"]: package["version"] for package in record["check"]["gpu_packages"]}
    name = column.lower()
    if name in packages and packages[name] is None:
        return str(say("not installed"))
    version = f"{packages[name]} " if name in packages else ""
    if "failed" in found:
        return f"{version}{say('failed')}"
    return f"{version}{say('passed' if found and set(found) == {'passed'} else 'not run')}"


if __name__ == "__main__":
    for language, file in READMES.items():
        file.write_text(replaced(file.read_text("utf-8"), table(language, read_records())), "utf-8")
        print(file.name)
