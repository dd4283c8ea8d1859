"""What `from ultralytics import YOLO` loads with this package: the seams and what they change, not the engine."""

import json

# The hook, the table of seams, and what `changed` rows call.
LOADED = {
    "yolov12",
    "yolov12.autopatch",
    "yolov12.caches",
    "yolov12.cfg",
    "yolov12.cfg.arguments",
    "yolov12.errors",
    "yolov12.joining",
    "yolov12.models",
    "yolov12.models.attention",
    "yolov12.models.blocks",
    "yolov12.models.layouts",
    "yolov12.models.necks",
    "yolov12.models.predictions",
    "yolov12.models.weight_names",
    "yolov12.models.yaml_check",
    "yolov12.printable",
    "yolov12.seams",
    "yolov12.training",
    "yolov12.training.model_call",
    "yolov12.untrusted",
    "yolov12.untrusted.names",
}

_LOADED = """
import json, sys
from ultralytics import YOLO
print(json.dumps(sorted(sys.modules)))
"""


def test_ultralytics_is_imported_without_the_engine(run_python):
    run = run_python("-c", _LOADED)
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert {name for name in loaded if name.partition(".")[0] == "yolov12"} == LOADED
    assert [name for name in loaded if name.startswith("triton")] == []


def test_no_other_package_is_loaded_than_by_ultralytics_alone(run_python):
    """Packages cost what modules of ours do not: the engine brought Triton and SciPy."""
    ours, stock = (
        {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}
        for run in (run_python("-c", _LOADED), run_python("-c", _LOADED, YOLOV12_AUTOPATCH="0"))
    )
    assert ours - stock == set()
