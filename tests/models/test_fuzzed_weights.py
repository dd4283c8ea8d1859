"""Damaged weight files, thousands of them: each is read, with bytes of the file alone, or is one clear error.

A process with little memory and time reads them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

LIMITED = Path(__file__).parent / "limited.py"


@pytest.mark.parametrize(("zipped", "seed"), [(True, 1), (False, 2)])
def test_a_damaged_file_is_read_or_is_one_clear_error(
    zipped: bool, seed: int, start_script: Callable[..., Any], deep: bool
) -> None:
    storage = torch.arange(64.0)
    inside = {
        "model": nn.Sequential(nn.Conv2d(1, 2, 3)),
        "views": [storage[2:6], storage.view(8, 8).t(), storage.half(), torch.tensor(3).expand(4), torch.zeros(0, 3)],
        "others": (OrderedDict(a=1), {1, 2}, torch.Size([2, 3]), np.float64(0.5), np.arange(4.0), torch.device("cpu")),
    }
    torch.save(inside, "small.pt", _use_new_zipfile_serialization=zipped)
    count = 100_000 if deep else 2_000
    script = start_script(LIMITED, "fuzz", "small.pt", count, seed)
    output, _ = script.communicate(timeout=1500)
    assert script.returncode == 0, output
    results = json.loads(output.splitlines()[-1])
    assert sum(results.values()) == count
    assert min(results["read"], results["UnreadableWeightsError"], results["UntrustedWeightsError"]) > count / 100, (
        results
    )
