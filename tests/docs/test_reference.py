"""Pages of docs/reference and the text of --help are made from the same tables as the software."""

import re

import pytest
from ultralytics.utils import DEFAULT_CFG_DICT

from scripts.reference import FOLDER, pages
from yolov12 import cli
from yolov12.cfg.arguments import ARGUMENTS
from yolov12.cfg.reference import COMMANDS, DEFAULTS, help_text, ultralytics_arguments


@pytest.mark.parametrize("name", ["arguments.md", "exit-status.md", "journal.md"])
def test_page_is_up_to_date(name):
    assert (FOLDER / name).read_text("utf-8") == pages()[name], "python scripts/reference.py writes it anew"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_arguments_of_the_command(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text(command)
    assert f"usage: yolov12 {command} key=value" in text
    for argument in ARGUMENTS:
        assert (f"\n  {argument.name}={argument.default}\n" in text) is (command in argument.commands)
    assert max(map(len, text.splitlines())) <= 100


def test_defaults_of_the_command_line_are_those_that_it_uses(monkeypatch):
    given = {}
    for command, defaults in DEFAULTS.items():
        monkeypatch.setitem(cli.VERBS, command, given.update)
        given.clear()
        assert cli.main([command, "model=yolov12n.yaml"]) in (0, None)
        assert defaults.items() <= given.items()
        for name, value in defaults.items():
            assert f" {name}={value} " in help_text(command).replace("\n", " ")
            cli.main([command, "model=yolov12n.yaml", f"{name}=torchscript"])
            assert given[name] == "torchscript"


def test_every_command_that_trains_or_uses_a_model_has_help():
    assert COMMANDS.keys() == cli.VERBS.keys()


def test_arguments_of_ultralytics_are_all_there_with_their_defaults():
    found = {name: default for names in ultralytics_arguments().values() for name, default in names.items()}
    ours = {argument.name for argument in ARGUMENTS}
    assert found == {name: default for name, default in DEFAULT_CFG_DICT.items() if name not in ours}
    assert not ours & found.keys()


def test_help_for_train_has_every_argument_that_training_reads():
    text = help_text("train")
    sections = ultralytics_arguments()
    for name in (*sections["Train"], *sections["Hyperparameters"], *sections["Val/Test"]):
        assert f" {name}=" in text


def test_check_has_help_of_its_own(capsys):
    assert cli.main(["check", "--help"]) == 0
    assert "yolov12 check [device=0] [--json]" in capsys.readouterr().out


def test_exit_statuses_are_those_of_the_command_line(capsys):
    assert cli.main([]) in cli.EXIT_STATUSES
    assert cli.main(["trian"]) == 2
    assert {0, 1, 2, 130, 143} == cli.EXIT_STATUSES.keys()


def test_every_variable_that_the_documentation_names_is_in_the_table():
    root = FOLDER.parents[1]
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), root / ".github" / "workflows" / "image.yml"]
    named = {name for page in pages for name in re.findall(r"YOLOV12_[A-Z_]*[A-Z]", page.read_text("utf-8"))}
    assert named <= cli.ENVIRONMENT.keys()
