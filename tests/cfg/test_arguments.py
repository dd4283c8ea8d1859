"""The table of arguments is the one source for Ultralytics' configuration and for each part of the package."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ultralytics.cfg import CFG_BOOL_KEYS, get_cfg
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, DEFAULT_CFG_PATH

from yolov12.cfg.arguments import ARGUMENTS, DATA, ENGINE, EXPORT, RUN, defaults
from yolov12.cli import VERBS
from yolov12.export import options as export
from yolov12.mas.config import DEFAULTS, Config
from yolov12.models.layouts import packaged_yaml
from yolov12.training.run import options as run


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.name)
def test_ultralytics_knows_every_argument(argument):
    assert DEFAULT_CFG_DICT[argument.name] == argument.default
    assert getattr(DEFAULT_CFG, argument.name) == getattr(get_cfg(), argument.name) == argument.default
    assert (argument.name in CFG_BOOL_KEYS) is isinstance(argument.default, bool)


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.name)
def test_every_argument_says_what_it_does(argument):
    assert re.fullmatch(r"[A-Z][^.]*(\.[^. ][^.]*)*\.", argument.help), "one sentence"
    assert argument.values
    assert not argument.values.endswith(".")
    assert argument.group in (ENGINE, DATA, RUN, EXPORT)
    assert set(argument.commands) <= set(VERBS)


def test_each_part_reads_its_own():
    parts = [DEFAULTS, run.OPTIONS, export.OPTIONS]
    assert sum(len(part) for part in parts) == len({each.name for each in ARGUMENTS}) == len(ARGUMENTS)
    assert {key: value for part in parts for key, value in part.items()} == defaults()
    assert Config.parse(DEFAULTS) == Config()
    run.check_data_arguments(run.OPTIONS)
    assert run.Interval.parse(run.OPTIONS["save_every"]).seconds == 300


def test_the_table_loads_without_what_it_describes():
    code = (
        "import sys, yolov12.cfg.arguments; print([name for name in ('torch', 'ultralytics') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_yamls_are_found_beside_the_table():
    file, scale = packaged_yaml("yolov12s.yaml")
    assert (file.is_file(), scale) == (True, "s")
    assert Path(file).parents[1] == Path(sys.modules["yolov12.cfg.arguments"].__file__).parent


def test_a_configuration_of_ultralytics_own_defaults_is_completed():
    """Users load `default.yaml`, change it, and give it to a trainer or validator of Ultralytics."""
    stock = yaml.safe_load(Path(DEFAULT_CFG_PATH).read_text())
    for given in (stock, SimpleNamespace(**stock)):
        made = vars(get_cfg(given, {"bn_group": 4}))
        assert {name: made[name] for name in defaults()} == {**defaults(), "bn_group": 4}
