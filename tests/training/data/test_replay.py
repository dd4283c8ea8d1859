"""Old images are mixed into a training: in the fraction asked for, with the labels of the new data, and resumably."""

import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import SequentialSampler
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolov12.errors import ConfigError, DataError
from yolov12.training.data import replay
from yolov12.training.data.loader import SKIPPED, ResumableLoader, resumable
from yolov12.training.data.places import Placed
from yolov12.training.data.random_state import random_state, set_random_state
from yolov12.training.data.replay import ReplaySampler, replayed_images, with_class_ids
from yolov12.training.data.sharing import Sharing
from yolov12.training.run.options import OPTIONS, check_data_arguments
from yolov12.training.run.preflight import check_training_arguments

NEW, OLD = 16, 8  # number of images


@pytest.mark.parametrize(
    ("new", "old", "fraction"), [(70, 100, 0.3), (70, 7, 0.3), (10, 10, 0.5), (3, 1, 0.1), (1, 9, 0.9)]
)
def test_an_epoch_has_each_new_image_once_and_the_fraction_of_old_ones(new, old, fraction):
    count = replayed_images(new, fraction)
    assert abs(count / (new + count) - fraction) <= 0.5 / (new + count) or count == 1
    sampler = ReplaySampler(new, old, count, torch.Generator().manual_seed(0))
    first, second = list(sampler), list(sampler)
    for epoch in (first, second):
        assert len(epoch) == len(sampler) == new + count
        times = Counter(epoch)
        assert all(times[index] == 1 for index in range(new))
        assert {times[index] for index in range(new, new + old)} <= {count // old, count // old + 1}
    assert first != second
    assert first == list(ReplaySampler(new, old, count, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def yamls(tmp_path_factory, trainings):
    """Data sets of 16 new and 8 old images. The class `odd` has another id, and `even` is only in the old one."""
    folder = tmp_path_factory.mktemp("replay")
    new = Path(trainings.draw_data(folder / "new", sizes=[(64, 64), (48, 80)]))
    new.write_text(yaml.safe_dump({**yaml.safe_load(new.read_text()), "names": {0: "third", 1: "x", 2: "odd"}}))
    return str(new), trainings.draw_data(folder / "old")


class Trainer:
    """What `mixed` uses of a trainer, with Ultralytics' own data sets and loaders."""

    def __init__(self, data, old, **arguments):
        defaults = {"imgsz": 64, "mosaic": 0.8, "mixup": 0.3, "batch": 4, "nbs": 4, "replay_fraction": 0.2}
        self.args = get_cfg(overrides={**defaults, "task": "detect", "data": data, "replay": old, **arguments})
        self.data = check_det_dataset(data)
        self.batch_size, self.epochs, self.iterations = 4, 3, 0

    def build_dataset(self, path, mode="train", batch=None):
        return build_yolo_dataset(self.args, path, batch, self.data, mode=mode, rect=mode == "val")

    def get_dataloader(self, path, batch_size=4, rank=0, mode="train"):
        dataset = self.build_dataset(path, mode, batch_size)
        return build_dataloader(dataset, batch_size, 0, shuffle=mode == "train", rank=-1, device="cpu")

    def build_optimizer(self, iterations):
        self.iterations = iterations

    def loaders(self):
        init_seeds(1, deterministic=False)
        with replay.mixed(self):
            train = self.get_dataloader(self.data["train"])
            self.build_optimizer(iterations=99)
            return train, self.get_dataloader(self.data["val"], mode="val")


def test_both_data_sets_are_one_with_the_classes_of_the_new(yamls):
    trainer = Trainer(*yamls)
    train, val = trainer.loaders()
    for loader in (train, val):
        dataset = loader.dataset
        assert dataset.ni == len(dataset.labels) == len(dataset.im_files) == NEW + OLD
        assert [label["im_file"] for label in dataset.labels] == dataset.im_files
        for label in dataset.labels:
            file = Path(label["im_file"])
            text = (file.parents[1] / "labels" / f"{file.stem}.txt").read_text()
            lines = [int(line.split()[0]) for line in text.splitlines()]
            is_old = file.parents[1].name == "old"
            assert label["cls"][:, 0].tolist() == ([2 for index in lines if index == 1] if is_old else lines)
            assert len(label["bboxes"]) == len(label["cls"])
    assert [Path(file).parents[1].name for file in train.dataset.im_files] == ["new"] * NEW + ["old"] * OLD
    assert len(train) == 5  # 16 new images and 4 old ones
    assert len(val) == 6
    assert isinstance(val.sampler, SequentialSampler)
    assert sum(len(batch["im_file"]) for batch in val) == NEW + OLD
    assert trainer.iterations == 5 * 3
    assert not {"build_dataset", "get_dataloader", "build_optimizer"} & vars(trainer).keys()
    partners = {Path(file).parents[1].name for batch in train for file in batch["im_file"]}
    assert partners == {"new", "old"}


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_images_of_both_are_cached(yamls, cache):
    dataset = Trainer(*yamls, cache=cache).loaders()[0].dataset
    assert dataset.cache == cache
    shapes = {dataset.load_image(index)[0].shape[2] for index in range(NEW + OLD)}
    assert shapes == {3}
    for file in dataset.npy_files:
        assert file.exists() == (cache == "disk")
        file.unlink(missing_ok=True)


def facts(batch):
    return batch["im_file"], batch["img"].sum().item(), batch["bboxes"].sum().item(), batch["cls"].flatten().tolist()


@pytest.mark.parametrize("done", [2, 7])
def test_a_resumed_loader_draws_and_augments_the_same_images(yamls, done):
    def loader():
        return ResumableLoader(Trainer(*yamls).loaders()[0], 64).take_over()

    whole, batches, state = loader(), [], None
    for batch in itertools.chain(whole, whole, whole):
        batches.append(facts(batch))
        if len(batches) == done:
            state = whole.state_dict()
            random = random_state()
    again = loader()
    again.load_state_dict(state, lambda: set_random_state(random))
    rest = [facts(batch) for _ in range(3 - (done - 1) // 5) for batch in again if SKIPPED not in batch]
    assert rest == batches[done:]


def test_ranks_share_the_batches_of_one_process(yamls):
    alone = Trainer(*yamls).loaders()[0]
    assert resumable(alone)
    wanted = [sorted(indices) for indices in itertools.islice(alone.batch_sampler, 5)]
    shares = []
    for rank in range(2):
        loader = Trainer(*yamls).loaders()[0]
        sharing = Sharing(rank, 2, batch=4, group=2, ahead=1)
        ours = ResumableLoader(loader, 64, sharing=sharing)
        shares.append([list(map(int, indices)) for indices in ours._order])
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == wanted


def test_labels_of_all_tasks_are_mapped_and_left_out_together():
    label = {
        "cls": np.array([[0.0], [1.0], [2.0], [1.0]], np.float32),
        "bboxes": np.arange(16.0).reshape(4, 4),
        "segments": ["a", "b", "c", "d"],
        "keypoints": np.arange(24.0).reshape(4, 2, 3),
    }
    empty = {"cls": np.zeros((0, 1), np.float32), "bboxes": np.zeros((0, 4)), "segments": [], "keypoints": None}
    assert with_class_ids([label, empty], {0: 5, 1: None, 2: 0}) == {1: 2}
    assert label["cls"].tolist() == [[5], [0]]
    assert label["cls"].dtype == np.float32
    assert label["bboxes"][:, 0].tolist() == [0, 8]
    assert label["segments"] == ["a", "c"]
    assert label["keypoints"][:, 0, 0].tolist() == [0, 12]


def test_old_classes_get_the_ids_of_their_new_names():
    old, new = {0: "scratch", 1: "Crack", 2: "dent"}, {0: "groove", 1: "crack"}
    assert replay.class_ids(old, new, None) == {0: None, 1: 1, 2: None}
    assert replay.class_ids(old, new, {"scratch": "groove"}) == {0: 0, 1: 1, 2: None}
    assert replay.class_ids(old, new, {"scratch": "crack", "dent": "crack"}) == {0: 1, 1: 1, 2: 1}  # two become one


def test_labels_of_a_renamed_class_are_kept(yamls, caplog, monkeypatch):
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    dataset = Trainer(*yamls, rename={"even": "third"}).loaders()[0].dataset
    assert {index for label in dataset.labels[NEW:] for index in label["cls"][:, 0].tolist()} == {0, 2}
    assert "left out" not in caplog.text


@pytest.mark.parametrize("with_polygons", [0, 1])
def test_polygons_of_one_data_set_alone_are_not_used(trainings, tmp_path, with_polygons):
    """Else an image of a mosaic would have polygons for some of its boxes, and lose the others."""
    tasks = ["detect", "detect"]
    tasks[with_polygons] = "segment"
    both = [trainings.draw_data(tmp_path / str(place), task) for place, task in enumerate(tasks)]
    dataset = Trainer(*both, mosaic=1.0, replay_fraction=0.5).loaders()[0].dataset
    assert not any(label["segments"] for label in dataset.labels)
    for sample in map(dataset.__getitem__, range(len(dataset))):
        assert len(sample["cls"]) == len(sample["bboxes"])
    segment = Trainer(both[with_polygons], both[with_polygons], task="segment")
    with pytest.raises(DataError, match="all its images"):
        segment.loaders()


def test_no_image_is_trained_on_and_validated(yamls, tmp_path):
    """The new data trains on some images that the old one validates on, and the other way round."""
    new, old = (yaml.safe_load(Path(file).read_text()) for file in yamls)
    images = sorted(Path(old["path"], "images").iterdir())
    for name, files in (("train", images[:4]), ("val", images[4:6])):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, files)))
    for key in ("train", "val"):
        new[key] = [str(Path(new["path"], "images")), str(tmp_path / f"{key}.txt")]
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({**new, "names": ["third", "even", "odd"]}))
    train, val = Trainer(str(tmp_path / "new.yaml"), yamls[1]).loaders()
    for loader in (train, val):
        files = [file for file in loader.dataset.im_files if file.startswith(old["path"])]
        assert len(files) == len(set(files))
    assert {str(file) for file in images[:4]}.isdisjoint(val.dataset.im_files)
    assert {str(file) for file in images[4:6]}.isdisjoint(train.dataset.im_files)
    assert {str(file) for file in images[6:]} <= set(train.dataset.im_files)


@pytest.mark.parametrize(("cache", "copy_paste"), [("ram", 0.5), (False, 0.0)])
def test_partners_of_mosaic_and_mixup_are_old_as_often_as_asked_for(yamls, cache, copy_paste):
    mixing = {"copy_paste": copy_paste, "copy_paste_mode": "mixup", "cutmix": 0.3, "cache": cache}
    dataset = Trainer(yamls[1], yamls[0], replay_fraction=0.2, **mixing).loaders()[0].dataset  # 8 new, 16 old
    closed = vars(dataset.transforms)["transforms"]
    for transforms in (closed, dataset.build_transforms(get_cfg(overrides={"mosaic": 1.0, "mixup": 1.0})).transforms):
        drawing = [each for each in transforms if type(each).__name__ in ("MixUp", "CutMix")]
        if cache == "ram":
            drawing.append(transforms[0].transforms[0])  # mosaic
        assert len(drawing) >= 2
        for transform in drawing:
            drawn = np.array([transform.get_indexes() for _ in range(2000)]).flatten()
            assert np.mean(drawn >= 8) == pytest.approx(0.2, abs=0.04)  # of all images, two thirds are old
            assert set(drawn) == set(range(24))


def test_partners_are_the_same_in_a_worker_that_is_spawned(yamls):
    loader = ResumableLoader(Trainer(*yamls, mosaic=1.0, mixup=1.0).loaders()[0], 64).take_over()
    dataset = pickle.loads(pickle.dumps(loader.dataset))
    places = [0, 1, NEW, NEW + 1]
    batch = Placed(places, [5, 6, 7, 8], [places] * 4)
    ours, theirs = (each.__getitems__(batch) for each in (loader.dataset, dataset))
    assert [sample["bboxes"].tolist() for sample in ours] == [sample["bboxes"].tolist() for sample in theirs]


def test_the_old_data_set_may_be_ndjson(yamls, monkeypatch):
    monkeypatch.setattr(
        "ultralytics.data.utils.convert_ndjson_to_yolo_if_needed", lambda data: yamls[1] if data == "o.ndjson" else data
    )
    trainer = Trainer(yamls[0], "o.ndjson")
    assert len(trainer.loaders()[0].dataset) == NEW + OLD
    assert trainer.args.replay == yamls[1]


def test_an_old_data_set_that_is_gone_is_named(yamls):
    with pytest.raises(DataError, match=r"replay=gone.yaml: .*Give replay= with its place, also to resume"):
        Trainer(yamls[0], "gone.yaml").loaders()


def test_images_that_are_in_both_are_new_ones(yamls):
    with pytest.raises(DataError, match="all its images are in data="):
        Trainer(yamls[0], yamls[0]).loaders()


def test_a_data_set_or_loader_of_ones_own_is_refused(yamls):
    class OwnLoader(Trainer):
        def get_dataloader(self, *args, **kwargs):
            loader = super().get_dataloader(*args, **kwargs)
            return torch.utils.data.DataLoader(loader.dataset)

    class OwnData(Trainer):
        def build_dataset(self, *args, **kwargs):
            return [1, 2, 3]

    class OwnDataInTheLoader(Trainer):
        def get_dataloader(self, path, batch_size=4, rank=0, mode="train"):
            dataset = build_yolo_dataset(self.args, path, batch_size, self.data, mode=mode)
            return build_dataloader(dataset, batch_size, 0, shuffle=mode == "train", rank=-1, device="cpu")

    for kind in (OwnLoader, OwnData, OwnDataInTheLoader):
        with pytest.raises(ConfigError, match="replay needs"):
            kind(*yamls).loaders()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"replay_fraction": value} for value in (0, 1, -0.1, 1.5, True, "half", None)),
        *({"replay": value} for value in (True, "", 3)),
        {"replay": "old.yaml", "mas": False},
        {"replay": "old.yaml", "rect": True},
        *({"rename": value} for value in ("scratch", ["a", "b"], {"a": 1}, {1: "a"})),
        *({"rename": {"a": "b"}, name: False} for name in ("mas", "cls_remap")),
    ],
)
def test_values_that_make_no_sense_are_refused(wrong):
    check_data_arguments({**OPTIONS, "mas": True, "cls_remap": False, "replay": "old.yaml", "rename": {"a": "b"}})
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        check_data_arguments({**OPTIONS, "mas": True, **wrong})


def test_an_old_data_set_that_cannot_be_used_is_refused_before_any_work(yamls, tmp_path):
    new, old = yamls
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({**yaml.safe_load(Path(old).read_text()), "train": "labels"}))
    (tmp_path / "only-train.yaml").write_text(yaml.safe_dump({**yaml.safe_load(Path(old).read_text()), "val": None}))
    check_training_arguments({"data": new, "replay": str(tmp_path / "only-train.yaml")}, "detect")
    (tmp_path / "no-val.yaml").write_text(yaml.safe_dump({**yaml.safe_load(Path(old).read_text()), "val": "gone"}))
    for replayed, task, words in (
        (str(tmp_path / "no-val.yaml"), "detect", "no images for 'val' in .*gone. Leave 'val:' empty to do without"),
        ("missing.yaml", "detect", "replay=missing.yaml: .*missing.yaml"),
        (str(tmp_path / "empty.yaml"), "detect", "no images for 'train'"),
        ("demo:iamges=5", "detect", "did you mean images"),
        (old, "classify", "a classify training cannot replay"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            check_training_arguments({"data": new, "replay": replayed}, task)


def test_data_sets_without_a_common_class_get_a_warning(yamls, caplog, monkeypatch):
    monkeypatch.setattr("ultralytics.utils.LOGGER.propagate", True)
    check_training_arguments({"data": yamls[0], "replay": yamls[1]}, "detect")
    assert "no class of data=" not in caplog.text
    check_training_arguments({"data": yamls[0], "replay": "demo"}, "detect")
    assert "replay=demo: it has no class of data= by name, so its images are background" in caplog.text
    caplog.clear()
    check_training_arguments({"data": yamls[0], "replay": "demo", "single_cls": True}, "detect")
    check_training_arguments({"data": yamls[0], "replay": "demo", "rename": {"crack": "odd"}}, "detect")
    assert not caplog.text


def test_a_rename_is_checked_before_any_work(yamls):
    known = {0: "scratch"}
    given = {"data": yamls[0], "replay": yamls[1]}
    check_training_arguments({**given, "rename": {"even": "third", "scratch": "x"}}, "detect", known)
    for rename in ({"evn": "third"}, {"even": "thrid"}):
        with pytest.raises(ConfigError, match="did you mean"):
            check_training_arguments({**given, "rename": rename}, "detect", known)


def test_the_old_data_set_may_be_the_embedded_one(monkeypatch):
    monkeypatch.setattr("yolov12.cfg.configuration.ensure", lambda spec, root, argument: Path(f"{spec}.yaml"))
    assert get_cfg(overrides={"replay": "demo:seed=1"}).replay == "demo:seed=1.yaml"
