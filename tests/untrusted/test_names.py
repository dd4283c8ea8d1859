"""Names that a file brings reach neither the terminal as commands nor a path outside of the folder they belong to."""

from __future__ import annotations

import copy
import io
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.data import utils
from ultralytics.engine.results import Results
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import LOGGER, SETTINGS, TQDM, colorstr, downloads
from ultralytics.utils.downloads import get_google_drive_file_info, unzip_file

from yolov12 import cli
from yolov12.errors import DataError, plain
from yolov12.printable import printable, printable_lines

EVIL = "\x1b[2J\x1b]0;t\x07a\nb\r\x9b1m\u202ec\u2028d"
SAFE = r"\x1b[2J\x1b]0;t\x07a\nb\r\x9b1m\u202ec\u2028d"


@pytest.mark.parametrize("name", ["person", "Ä 人 👩\u200d👧", "a/b", r"back\slash", "می\u200cخواهم", ""])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert printable(name) == printable_lines(name) == name


def test_control_characters_become_escapes_once() -> None:
    assert printable(EVIL) == printable(SAFE) == SAFE
    assert (
        printable_lines("\x1b[1;31mred\x1b[0m\n\ttab\x1b[2Kx\x1b[31") == "\x1b[1;31mred\x1b[0m\n\ttab\\x1b[2Kx\\x1b[31"
    )


def printed(out: str) -> None:
    """Check what reached the terminal."""
    assert "\\x1b[2J" in out
    for each in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\u2028"):
        assert each not in out


class _Log:
    """What Ultralytics' own handlers would print."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    def __enter__(self) -> io.StringIO:
        self.handler = logging.StreamHandler(self.stream)
        LOGGER.addHandler(self.handler)
        return self.stream

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self.handler)


def from_log(_: str) -> str:
    with _Log() as log:
        LOGGER.warning(f"{colorstr('bold', 'x')} {EVIL}")
        LOGGER.info("%s", EVIL)
    assert "\x1b[1mx" in log.getvalue()
    return log.getvalue()


def from_a_progress_bar(_: str) -> str:
    stream = io.StringIO()
    bar = TQDM(range(2), desc=f"Scanning {EVIL}", file=stream)
    for _each in bar:
        bar.set_description(EVIL)
    bar.desc = EVIL
    bar.close()
    return stream.getvalue()


def from_a_data_set(_: str) -> str:
    Path("set.yaml").write_text('path: .\ntrain: .\nval: .\nnames: ["' + SAFE.replace("\\x9b", "\\x9b") + '"]\n')
    return utils.check_det_dataset("set.yaml")["names"][0]


def from_a_folder(_: str) -> str:
    for split in ("train", "val"):
        (folder := Path("cls") / split / EVIL).mkdir(parents=True)
        (folder / "a.png").touch()
    return utils.check_cls_dataset("cls")["names"][0]


def from_a_checkpoint(tiny_model: str) -> str:
    model = YOLO(tiny_model)
    model.model.names = dict.fromkeys(range(10), EVIL)
    torch.save({"model": copy.deepcopy(model.model), "train_args": {}}, "evil.pt")
    model = YOLO("evil.pt")
    with _Log() as log:
        result = model(np.zeros((32, 32, 3), np.uint8), imgsz=32, conf=0.0, max_det=1, device="cpu")[0]
    assert EVIL not in result.verbose()
    return "".join([log.getvalue(), model.names[0], result.names[0], result.to_json()])


def from_an_exported_model(tiny_model: str) -> str:
    """The metadata of every format passes this way."""
    return check_class_names({"0": EVIL})[0]


def from_an_error(_: str) -> str:
    return plain(DataError(f"\x1b[31m{EVIL}"))


ROUTES: dict[str, Callable[[str], str]] = {
    function.__name__.removeprefix("from_").replace("_", " "): function
    for function in (
        from_log,
        from_a_progress_bar,
        from_a_data_set,
        from_a_folder,
        from_a_checkpoint,
        from_an_exported_model,
        from_an_error,
    )
}


@pytest.mark.parametrize("route", ROUTES)
def test_no_name_moves_the_cursor(route: str, tiny_model: str) -> None:
    printed(ROUTES[route](tiny_model))


def test_the_last_line_of_a_command_is_one_line(capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    Path("set.yaml").write_text('path: "nowhere\\e[2J"\ntrain: t\nval: v\nnames: [a]\n')
    assert cli.main(["train", f"model={tiny_model}", "data=set.yaml", "device=cpu"]) in (1, 2)
    error = capsys.readouterr().err
    assert "\\x1b[2J" in error
    assert "\x1b[2J" not in error


# -- paths ------------------------------------------------------------------------------------------------------------

INSIDE = {
    "car": "car",
    "car/red": "car/red",
    "a..b": "a..b",
    "../x": "_/x",
    "a/../../x": "a/_/_/x",
    "..": "_",
    "/etc/x": "etc/x",
    "..\\x": "_/x",
    "C:\\x": "C_/x",
    "//host/x": "host/x",
    "a\nb": r"a\nb",
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kind", [dict, list])
def test_crops_stay_in_their_folder(name: str, kind: type, tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    boxes = torch.tensor([[2.0, 2, 20, 20, 0.9, 0]])
    names: Any = {0: name} if kind is dict else [name]
    crops = tmp_path / "deep" / "deeper" / "crops"
    Results(image, "a.jpg", names, boxes=boxes).save_crop(crops, "im")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [crops / INSIDE[name] / "im.jpg"]


def test_a_prediction_with_save_crop_writes_into_its_run(tiny_model: str, tmp_path: Path) -> None:
    model = YOLO(tiny_model)
    model.model.names = dict.fromkeys(range(10), "../../../outside")
    run = tmp_path / "a" / "b" / "run"
    model(np.zeros((32, 32, 3), np.uint8), imgsz=32, conf=0, max_det=1, save_crop=True, project=run.parent, name="run")
    assert list(run.rglob("*.jpg"))
    assert not [file for file in tmp_path.rglob("*.jpg") if not file.is_relative_to(run)]


@pytest.mark.parametrize(
    ("named", "outside"),
    [("save_dir", True), ("project", True), ("name", True), ("task", True), ("save_dir", False), ("project", False)],
)
def test_a_checkpoint_does_not_choose_where_a_resumed_run_writes(
    named: str, outside: bool, tiny_model: str, tmp_path: Path
) -> None:
    runs = Path(SETTINGS["runs_dir"])
    folder = {True: tmp_path / "of-the-user", False: runs / "mine"}[outside]
    value = os.path.relpath(folder, runs / "detect" / "p") if named in ("name", "task") else str(folder)
    settings = {"task": "detect", "project": "p", "name": "n", "epochs": 3, named: value}
    torch.save({"model": YOLO(tiny_model).model, "epoch": 0, "optimizer": {}, "train_args": settings}, "downloaded.pt")
    trainer: Any = object.__new__(DetectionTrainer)
    trainer.args = get_cfg(overrides={"resume": "downloaded.pt"})
    trainer.check_resume({"resume": "downloaded.pt"})
    used = get_save_dir(trainer.args)
    assert used.is_relative_to(runs)
    assert not folder.exists() or not outside
    if outside:
        assert used.name.startswith("resumed")


@pytest.mark.parametrize(
    ("given", "used"), [("../../x.zip", "x.zip"), ("..\\x.zip", "x.zip"), ("x.zip", "x.zip"), (None, None)]
)
def test_a_server_does_not_choose_the_folder_of_a_download(
    given: str | None, used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = {"content-disposition": f'attachment; filename="{given}"'} if given else {}
    response = SimpleNamespace(content=b"", cookies={}, headers=header)
    monkeypatch.setattr("requests.Session.get", lambda *_, **__: response)
    assert get_google_drive_file_info("https://drive.google.com/file/d/abc/view")[1] == used
    assert downloads.get_google_drive_file_info is get_google_drive_file_info


def test_archives_write_into_their_folder_only(tmp_path: Path) -> None:
    """Ultralytics itself sees to this."""
    with zipfile.ZipFile("set.zip", "w") as archive:
        for name in ("set/a.txt", "../b.txt", "/c.txt", "set/../../d.txt"):
            archive.writestr(name, "x")
    unzip_file("set.zip", tmp_path / "deep")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["a.txt"]
