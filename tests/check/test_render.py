"""Reports of simulated machines as text and as JSON."""

import json
from dataclasses import replace

from yolov12.check import problems
from yolov12.check.render import as_json, as_text
from yolov12.check.report import Gpu, OtherProcess

GIB = 2**30


def test_jetson_without_nvml(machine):
    orin = Gpu(0, "Orin", (8, 7), 30 * GIB, 21 * GIB, "MemAvailable", integrated=True)
    report = machine(orin, cuda={"driver": None, "driver_cuda": (12, 2), "arch_list": ("sm_87",)})
    assert problems(report) == []
    text = as_text(report)
    assert "integrated" in text
    assert "others     not available" in text
    assert "version not available, supports CUDA 12.2" in text


def test_memory_used_by_no_visible_process_is_mentioned(machine, h100):
    assert "other containers" in as_text(machine(replace(h100, free_bytes=40 * GIB)))
    assert "other containers" not in as_text(machine(h100))
    assert "other containers" not in as_text(machine(replace(h100, free_bytes=40 * GIB, own_bytes=39 * GIB)))


def test_json_holds_the_report_and_the_judgement(machine, t4):
    told = json.loads(as_json(machine(replace(t4, processes=(OtherProcess(1, "x", 5),)), device="7")))
    assert told["can_train"] is False
    assert len(told["problems"]) == 1
    assert told["gpus"][0]["free_bytes"] == 14 * GIB
    assert told["gpus"][0]["processes"] == [{"pid": 1, "name": "x", "used_bytes": 5}]
