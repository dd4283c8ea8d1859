from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ultralytics.utils import downloads

from yolov12.errors import WeightsError
from yolov12.models import weights


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from ultralytics import utils

    folder = tmp_path / "weights of mine"
    monkeypatch.setattr(utils, "SETTINGS", {"weights_dir": folder})
    return folder


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the requested addresses. Each download is a file that contains its address."""
    urls: list[str] = []

    def safe_download(url: str, file: str, dir: str, **kwargs: Any) -> Path:
        urls.append(url)
        target = Path(dir) / file
        target.write_text(url)
        return target

    monkeypatch.setattr(downloads, "safe_download", safe_download)
    return urls


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(downloads, "safe_download", refuse)
    monkeypatch.setattr(downloads, "get_github_assets", refuse)


RELEASES = "https://github.com/sunsmarterjie/yolov12/releases/download"


@pytest.mark.parametrize(
    ("asked", "url"),
    [
        ("yolov12s.pt", f"{RELEASES}/turbo/yolov12s.pt"),
        ("yolov12x.pt", f"{RELEASES}/turbo/yolov12x.pt"),
        ("yolov12s-v1.pt", f"{RELEASES}/v1.0/yolov12s.pt"),
    ],
)
def test_official_weights_are_fetched_once(asked: str, url: str, weights_dir: Path, fetched: list[str]) -> None:
    assert weights.resolve(asked) == str(weights_dir / asked)
    assert weights.resolve(asked) == str(weights_dir / asked)
    assert fetched == [url]
    assert (weights_dir / asked).read_text() == url
    assert [file.name for file in weights_dir.iterdir()] == [asked]


@pytest.mark.usefixtures("no_network")
def test_a_file_here_comes_before_one_in_the_weights_folder(weights_dir: Path) -> None:
    weights_dir.mkdir()
    (weights_dir / "yolov12s.pt").touch()
    (weights_dir / "mine.pt").touch()
    assert weights.resolve("yolov12s.pt") == str(weights_dir / "yolov12s.pt")
    assert weights.resolve("mine.pt") == str(weights_dir / "mine.pt")
    Path("yolov12s.pt").touch()
    assert weights.resolve("yolov12s.pt") == "yolov12s.pt"


def test_a_failed_download_says_where_to_put_the_file_and_leaves_nothing(
    weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, file: str, dir: str, **kwargs: Any) -> Path:
        (Path(dir) / f".{file}.part").write_text("half")
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(downloads, "safe_download", fail)
    with pytest.raises(WeightsError) as caught:
        weights.resolve("yolov12m-v1.pt")
    assert f"{RELEASES}/v1.0/yolov12m.pt" in str(caught.value)
    assert str(weights_dir / "yolov12m-v1.pt") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(weights_dir.iterdir()) == []


def test_weights_of_ultralytics_are_left_to_ultralytics(weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attempt(file: str) -> str:
        asked.append(file)
        Path(file).touch()
        return file

    monkeypatch.setattr(downloads, "attempt_download_asset", attempt)
    assert weights.resolve("yolo11n.pt") == "yolo11n.pt"
    assert asked == ["yolo11n.pt"]


@pytest.mark.usefixtures("no_network", "weights_dir")
@pytest.mark.parametrize("missing", ["best.pt", "runs/train/weights/best.pt", "weights/yolov12s.pt", "yolov12z.pt"])
def test_a_missing_file_is_one_error_without_the_network(missing: str) -> None:
    with pytest.raises(WeightsError, match="does not exist") as caught:
        weights.load(missing)
    assert len(str(caught.value).splitlines()) == 1


def test_ultralytics_own_files_fail_offline_as_its_mixed_precision_check_expects(home):
    """`check_amp` runs before every training on a GPU. After a ConnectionError it continues without the file."""
    with pytest.raises(ConnectionError):
        weights.load(home / "weights" / "yolo26n.pt")
