import sys
import types

import pytest

import yolov12
from yolov12 import seams
from yolov12.errors import SeamError

PATCHED = "import ultralytics; from ultralytics.nn.modules.block import AAttn; print(AAttn.forward.__module__)"


def test_import_hook_joins_whoever_imports_ultralytics(run_python):
    assert run_python("-c", PATCHED).stdout.split()[-1] == "yolov12.models.layouts"


def test_environment_variable_turns_it_off(run_python):
    assert run_python("-c", PATCHED, YOLOV12_AUTOPATCH="0").stdout.split()[-1] == "ultralytics.nn.modules.block"


@pytest.mark.parametrize(
    "before", ["", "import ultralytics; ", "from ultralytics import YOLO; import ultralytics.engine.trainer; "]
)
def test_our_yolo_is_theirs_and_joined_even_when_they_were_imported_first(run_python, before):
    code = (
        before + "import yolov12, ultralytics; assert yolov12.YOLO is ultralytics.YOLO; "
        "import ultralytics.engine.trainer as t, ultralytics.cfg as c; assert t.get_cfg is c.get_cfg; "
        "assert c.get_cfg().recipe is True; assert hasattr(c.get_cfg, '__wrapped__'); "
        "print(yolov12.YOLO('yolov12n.yaml').model.yaml['layout'])"
    )
    run = run_python("-c", code, YOLOV12_AUTOPATCH="0")
    assert run.stdout.split()[-1] == "turbo", run.stderr


def test_spawned_processes_are_joined_too(run_python, tmp_path):
    file = tmp_path / "spawn.py"
    file.write_text(
        "import multiprocessing\n"
        "def joined():\n"
        "    import ultralytics.cfg\n"
        "    return hasattr(ultralytics.cfg.get_cfg, '__wrapped__')\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(joined))\n"
    )
    run = run_python(str(file))
    assert run.stdout.strip() == "True", run.stderr


def test_the_yolo_command_knows_our_arguments(run_python):
    run = run_python("-m", "ultralytics.cfg.__init__", "train", "recip=False")
    assert "recipe" in run.stderr


def test_start_costs_less_than_5_ms(run_python):
    def start_ms() -> float:
        lines = run_python("-X", "importtime", "-c", "pass").stderr.splitlines()
        (row,) = (line.split("|") for line in lines if line.endswith(" yolov12.autopatch"))
        return int(row[1]) / 1e3  # what it imports counts too

    assert any(start_ms() < 5 for _ in range(20))  # the least counts: other processes only ever add


def test_hook_imports_nothing_heavy(run_python):
    code = "import sys; print([m for m in ('torch', 'numpy', 'ultralytics', 'typing') if m in sys.modules])"
    assert run_python("-I", "-c", code).stdout.strip() == "[]"


def test_missing_seam_is_named():
    module = types.ModuleType("ultralytics.nn.tasks")
    module.parse_model = lambda *args: None
    for _ in range(2):  # importing it again must not pass for joined
        with pytest.raises(SeamError, match=r"no ultralytics\.nn\.tasks\.yaml_model_load.*==8\.4\.190.*AUTOPATCH=0"):
            seams.join(module)


def test_other_version_is_said_once():
    said = []
    module = types.ModuleType("ultralytics.utils")
    module.__version__ = "9.0.0"
    module.LOGGER = types.SimpleNamespace(warning=said.append, filters=[], addFilter=lambda each: None)
    module.DEFAULT_CFG_DICT, module.DEFAULT_CFG = {}, types.SimpleNamespace()
    seams.join(module)
    seams.join(module)
    assert len(said) == 1
    assert "8.4.190" in said[0]
    assert "9.0.0" in said[0]


def test_a_reloaded_module_is_joined_again(run_python):
    code = (
        "import importlib, ultralytics.nn.tasks as t; importlib.reload(t); print(hasattr(t.parse_model, '__wrapped__'))"
    )
    assert run_python("-c", code).stdout.split()[-1] == "True"


def test_every_seam_is_joined_once_before_a_hook_that_chains(run_python, tmp_path):
    """One behind ours, that asks all other finders and takes part in what runs; more kinds are in test_import_hook."""
    file = tmp_path / "hooks.py"
    file.write_text(
        "import importlib, sys\n"
        "class Hook:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if not name.startswith('ultralytics'):\n"
        "            return None\n"
        "        others = [finder for finder in sys.meta_path if finder is not self]\n"
        "        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)\n"
        "        if spec is not None:\n"
        "            run = spec.loader.exec_module\n"
        "            spec.loader.exec_module = lambda module: run(module)\n"
        "        return spec\n"
        "sys.meta_path.insert(1, Hook())\n"
        "from ultralytics import YOLO\n"
        "from yolov12 import seams\n"
        "for module, rows in seams.SEAMS.items():\n"
        "    for path in (path for path, row in rows.items() if not row.once):\n"
        "        wrapper = getattr(*seams.find(importlib.import_module(module), path))\n"
        "        print(hasattr(wrapper, '__yolov12_seam__'), hasattr(wrapper.__wrapped__, '__yolov12_seam__'))\n"
    )
    run = run_python(str(file))
    rows = sum(not row.once for rows in seams.SEAMS.values() for row in rows.values())
    assert run.stdout.splitlines()[-rows:] == ["True False"] * rows, run.stderr


_OURS = "yolov12, yolov12.mas, yolov12.training.run.setup, yolov12.training.seams, yolov12.export.seams"
_STOCK = """
import {0}
import {1}
import importlib, sys
from ultralytics import YOLO
from yolov12 import seams
places = [seams.find(importlib.import_module(name), path) for name, rows in seams.SEAMS.items() for path in rows]
def joined():
    return sum(hasattr(getattr(*place), "__yolov12_seam__") for place in places), "mas" in places[0][0].DEFAULT_CFG_DICT
before = joined()
assert yolov12.YOLO is YOLO
print(before, joined() == (len(places) - 5, True))  # five are values, which carry no mark
"""


@pytest.mark.parametrize("order", [(_OURS, "ultralytics"), ("ultralytics", _OURS)], ids=["ours first", "ours last"])
def test_switched_off_ultralytics_stays_stock_whatever_of_ours_is_imported(run_python, order):
    run = run_python("-c", _STOCK.format(*order), YOLOV12_AUTOPATCH="0")
    assert run.stdout.splitlines()[-1:] == ["(0, False) True"], run.stderr


def test_processes_of_one_that_asked_for_us_are_joined(run_python):
    code = (
        "import subprocess, sys; from yolov12 import YOLO; "
        f"print(subprocess.run([sys.executable, '-c', {PATCHED!r}], capture_output=True, text=True).stdout)"
    )
    assert run_python("-c", code, YOLOV12_AUTOPATCH="0").stdout.split()[-1] == "yolov12.models.layouts"


def test_public_surface():
    assert yolov12.__all__ == ["YOLO", "__version__"]
    assert yolov12.YOLO is sys.modules["ultralytics"].YOLO
    with pytest.raises(AttributeError, match="no attribute 'YOLOX'"):
        _ = yolov12.YOLOX
