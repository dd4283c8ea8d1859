"""Code in a data set yaml runs if the user or the Ultralytics package is its author, and not otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ultralytics import YOLO
from ultralytics.data import utils
from ultralytics.utils import ROOT, YAML

from yolov12 import cli
from yolov12.errors import UntrustedDataError

CODE = "import pathlib; pathlib.Path('CANARY').touch()"
TEXT = "path: nowhere\ntrain: images/train\nval: images/val\nnames: [a]\n"


def write(name: str = "set.yaml", download: str = CODE) -> str:
    Path(name).write_text(f"{TEXT}download: |\n  {download}\n")
    return name


def in_a_folder() -> str:
    Path("folder").mkdir()
    write("folder/any.yaml")
    return "folder"


def of_a_conversion() -> str:
    """The yaml that Ultralytics makes of an NDJSON data set holds every key of its first line."""
    YAML.save("data.yaml", {"path": "nowhere", "train": "t", "val": "v", "names": {0: "a"}, "download": CODE})
    return "data.yaml"


def with_a_name_of_ultralytics() -> str:
    shutil.copy(ROOT / "cfg" / "datasets" / "coco8.yaml", "coco8.yaml")
    with Path("coco8.yaml").open("a") as file:
        file.write(f"\ndownload: {CODE!r}\npath: nowhere\n")
    return "coco8.yaml"


ROUTES: dict[str, Callable[[], str]] = {
    "yaml": write,
    "bash": lambda: write(download="bash -c touch${IFS}CANARY"),
    "bare name": lambda: write("set.yml") and "set",
    "capitals": lambda: write("SET.YAML"),
    "spaces": lambda: f" {write()} ",
    "looks like an address": lambda: write(download="http = " + CODE),
    "address of no archive": lambda: write(download="https://example.com/set.py"),
    "folder": in_a_folder,
    "NDJSON": of_a_conversion,
    "name of Ultralytics": with_a_name_of_ultralytics,
}


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what Ultralytics would run or fetch."""
    found: list[Any] = []
    run = utils.subprocess.run

    def collect(command: list[str], **options: Any) -> Any:
        return found.append(command) if command[0] == "bash" else run(command, **options)

    monkeypatch.setattr(utils.subprocess, "run", collect)
    monkeypatch.setattr(utils, "safe_download", lambda url, **_: found.append(url))
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_code_is_not_run_and_the_error_shows_it(route: str, ran: list[Any]) -> None:
    with pytest.raises(UntrustedDataError, match=r"missing path '.*nowhere.*which was not run.*YOLOV12_TRUST_DATA=1"):
        utils.check_det_dataset(ROUTES[route]())
    assert not ran
    assert not Path("CANARY").exists()


@pytest.mark.parametrize("verb", ["train", *(pytest.param(verb, marks=pytest.mark.deep) for verb in ("val", "export"))])
def test_no_command_runs_it(verb: str, tiny_model: str, capsys: pytest.CaptureFixture[str], ran: list[Any]) -> None:
    more = ["format=onnx", "int8=True"] if verb == "export" else []
    assert cli.main([verb, f"model={tiny_model}", f"data={write()}", "device=cpu", "epochs=1", *more]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    if verb != "export":  # which logs the error, and says that the export failed
        assert "YOLOV12_TRUST_DATA=1" in error
        assert "pathlib.Path" in error
    assert not ran
    assert not Path("CANARY").exists()


def test_a_checkpoint_that_names_such_a_yaml_does_not_run_it(tiny_model: str) -> None:
    model = YOLO(tiny_model)
    model.overrides["data"] = write()  # as `data` of a checkpoint is taken over
    with pytest.raises(UntrustedDataError):
        model.val(device="cpu")
    assert not Path("CANARY").exists()


@pytest.mark.parametrize("download", [CODE, "bash get.sh now"])
def test_the_switch_runs_it(download: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV12_TRUST_DATA", "1")
    utils.check_det_dataset(write(download=download))
    assert Path("CANARY").exists() or ran == [["bash", "get.sh", "now"]]


def test_an_address_needs_no_switch(ran: list[Any]) -> None:
    address = "https://example.com/set.zip?download=1"
    utils.check_det_dataset(write(download=address))
    assert [url.strip() for url in ran] == [address]


def test_data_that_is_there_needs_no_switch(make_data_set: Callable[..., Path]) -> None:
    make_data_set("nowhere")
    assert utils.check_det_dataset(write())["nc"] == 1


@pytest.mark.parametrize("copied", [False, True])
def test_the_yamls_of_ultralytics_are_trusted_as_the_package_is(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in the README trains on coco.yaml, whose `download:` is Python code."""
    downloads: list[Any] = []
    monkeypatch.setattr("ultralytics.utils.downloads.download", lambda urls, **_: downloads.extend(urls))
    if copied:
        shutil.copy(ROOT / "cfg" / "datasets" / "coco.yaml", "coco.yaml")
    utils.check_det_dataset("coco.yaml")
    assert any("val2017.zip" in url for url in downloads)


def test_other_errors_of_a_data_set_are_those_of_ultralytics() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        utils.check_det_dataset("none.yaml")
    with pytest.raises(FileNotFoundError, match="'test:' images not found"):
        utils.check_det_dataset(write(), split="test")
    with pytest.raises(FileNotFoundError, match="missing path"):
        utils.check_det_dataset(write(), autodownload=False)
