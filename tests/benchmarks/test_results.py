"""Every committed result says when it was measured, and with which code."""

import json

import pytest

from benchmarks.common.processes import ROOT

HEAD = {"measured_on", "recorded_in", "earlier", "again", "note"}


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_each_part_has_a_date_and_a_commit(file):
    """From before commits were noted, it has the commit that brought the figures instead: `recorded_in`."""
    found = json.loads(file.read_text("utf-8"))
    heads, recorded = found.get("measured_on", {}), found.get("recorded_in", {})
    parts = [name for name, content in found.items() if isinstance(content, dict | list) and name not in HEAD]
    for part in parts or [""]:
        own = heads.get(part, {}) if isinstance(heads, dict) else {}
        own = own if isinstance(own, dict) else {}
        of_part = recorded.get(part, {}) if isinstance(recorded.get(part), dict) else {}
        for key in ("date", "commit"):
            assert any(each.get(key) for each in (own, found, of_part, recorded)), (part, key)
