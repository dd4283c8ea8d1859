"""The demo data set on disk: its content, reproducibility, and concurrent or interrupted writes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from yolov12.demo import DemoSpec, dataset, ensure
from yolov12.demo.board import CLASS_NAMES, HELD_BACK, Box, DrawConfig
from yolov12.demo.draw import draw_board
from yolov12.errors import DataError

HELD_BACK_IDS = [CLASS_NAMES.index(name) for name in HELD_BACK]


def contents(folder: Path) -> dict[str, str]:
    """Return relative path → hash of the bytes, for every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def labels(folder: Path) -> dict[str, np.ndarray]:
    """Return image number → label rows (n, 5)."""
    files = sorted(folder.glob("labels/*/*.txt"))
    return {p.stem: np.loadtxt(p, ndmin=2) for p in files}


@pytest.fixture(scope="module")
def default_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure("demo", tmp_path_factory.mktemp("default")).parent


# --- content


def test_default_holds_every_image_with_its_labels_in_two_splits(default_folder: Path) -> None:
    spec = DemoSpec()
    for kind, ending in (("images", "jpg"), ("labels", "txt")):
        assert len(list(default_folder.glob(f"{kind}/train/*.{ending}"))) == 128
        assert len(list(default_folder.glob(f"{kind}/val/*.{ending}"))) == 32
    assert {p.stem for p in default_folder.glob("images/*/*")} == set(labels(default_folder))
    shapes = {cv2.imread(str(p)).shape for p in list(default_folder.glob("images/*/*"))[:10]}
    assert shapes == {(spec.imgsz, spec.imgsz, 3)}


def test_every_class_appears_in_both_splits_of_the_default(default_folder: Path) -> None:
    for split in ("train", "val"):
        rows = "".join(p.read_text() for p in default_folder.glob(f"labels/{split}/*.txt")).splitlines()
        assert {int(row.split()[0]) for row in rows} == set(range(len(CLASS_NAMES)))


def test_boxes_are_some_pixels_large_and_inside_the_image(default_folder: Path) -> None:
    rows = np.concatenate(list(labels(default_folder).values()))
    centres, sizes = rows[:, 1:3], rows[:, 3:5]
    rounding = 1e-6  # labels have six decimals
    assert (centres - sizes / 2 >= -rounding).all()
    assert (centres + sizes / 2 <= 1 + rounding).all()
    assert sizes.min() * DemoSpec().imgsz >= 3 - 1e-3


def test_a_few_images_hold_many_times_the_objects_of_most(default_folder: Path) -> None:
    counts = np.array([len(rows) for rows in labels(default_folder).values()])
    in_val = [len(p.read_text().splitlines()) for p in default_folder.glob("labels/val/*.txt")]
    assert counts.max() / np.median(counts) >= 8
    assert (counts >= 150).sum() == 8  # one in twenty of 160
    assert max(in_val) >= 150  # the validation split has such images, too
    assert ((counts >= 5) & (counts <= 40)).mean() >= 0.85


# --- the same data set again, larger, or in another place


def test_same_spec_same_bytes_and_another_seed_another_picture(tmp_path: Path) -> None:
    first = ensure("demo:images=25,seed=3", tmp_path / "a").parent
    again = ensure("demo:seed=3,images=25", tmp_path / "b").parent
    other = ensure("demo:images=25,seed=4", tmp_path / "a").parent
    assert contents(first) == contents(again)
    assert not set(contents(first).values()) & {v for k, v in contents(other).items() if k.endswith("jpg")}


def test_a_larger_data_set_begins_with_the_smaller(tmp_path: Path) -> None:
    small = contents(ensure("demo:images=10", tmp_path).parent)
    large = contents(ensure("demo:images=24", tmp_path).parent)
    del small["data.yaml"]
    assert small.items() <= large.items()


def test_an_existing_data_set_is_used_as_it_is(tmp_path: Path) -> None:
    data_yaml = ensure("demo:images=5", tmp_path)
    picture = next(data_yaml.parent.glob("images/train/*"))
    picture.write_bytes(b"mine now")
    assert ensure("demo:images=5", tmp_path) == data_yaml
    assert picture.read_bytes() == b"mine now"


def test_ultralytics_accepts_it_even_after_a_move(tmp_path: Path) -> None:
    from ultralytics.data.utils import check_det_dataset

    moved = ensure("demo:images=5", tmp_path / "a").parent.rename(tmp_path / "moved")
    checked = check_det_dataset(str(moved / "data.yaml"))
    assert checked["names"] == dict(enumerate(CLASS_NAMES))
    assert Path(checked["train"]) == moved / "images" / "train"
    assert Path(checked["val"]) == moved / "images" / "val"


# --- holding classes back


def test_holding_back_removes_two_defects_and_moves_no_class_id(tmp_path: Path) -> None:
    full = ensure("demo:images=40", tmp_path)
    held = ensure("demo:images=40,hold_back=True", tmp_path)
    assert full != held
    names, kept = (yaml.safe_load(p.read_text())["names"] for p in (full, held))
    assert list(names.values()) == list(CLASS_NAMES)
    assert kept == {i: name for i, name in names.items() if i not in HELD_BACK_IDS}
    all_rows, kept_rows = labels(full.parent), labels(held.parent)
    assert any(np.isin(rows[:, 0], HELD_BACK_IDS).any() for rows in all_rows.values())
    for number, rows in all_rows.items():
        rest = {tuple(row) for row in rows if row[0] not in HELD_BACK_IDS}
        sound = {tuple(row) for row in kept_rows[number]}
        assert rest <= sound  # all other boxes and ids are unchanged
        shifted = sum(rows[:, 0] == CLASS_NAMES.index("shifted"))
        assert len(sound - rest) == shifted  # without the shift, the part has its own label


# --- concurrent and interrupted writes


def test_two_processes_at_once_both_get_the_whole_data_set(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from yolov12.demo import ensure\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "y = ensure('demo:images=30', Path(sys.argv[1]))\n"
        "print(y, len(list(y.parent.glob('labels/*/*.txt'))))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "shared")]
    where = Path(dataset.__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": where}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=800)[0] for process in both]
    alone = ensure("demo:images=30", tmp_path / "alone")
    folder = tmp_path / "shared" / alone.parent.name
    assert [p.returncode for p in both] == [0, 0]
    assert answers == [f"{folder / 'data.yaml'} 30\n"] * 2
    assert contents(folder) == contents(alone.parent)  # other processes draw the same bytes
    assert [p.name for p in (tmp_path / "shared").iterdir()] == [folder.name]  # the slower process deleted its copy


def test_an_interrupted_write_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def interrupted(rng: np.random.Generator, config: DrawConfig) -> tuple[np.ndarray, list[Box]]:
        drawn.append(sorted(p.name[0] for p in tmp_path.iterdir()))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw_board(rng, config)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "draw_board", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure("demo:images=5", tmp_path)
    assert drawn == [["."]] * 4  # during drawing, and so after SIGKILL, only a hidden folder exists
    assert list(tmp_path.iterdir()) == []
    assert len(labels(ensure("demo:images=5", tmp_path).parent)) == 5


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    folder = tmp_path / DemoSpec(images=5).folder
    folder.mkdir()
    (folder / "notes.txt").write_text("not a data set")
    with pytest.raises(DataError, match=folder.name):
        ensure("demo:images=5", tmp_path)
