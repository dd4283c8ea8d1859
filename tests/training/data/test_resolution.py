"""Images get smaller if nothing else helps, and later full again; otherwise no image is changed."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.mas import Engine
from yolov12.mas.distributed.ranks import RankStatus
from yolov12.training.data.places import Placed
from yolov12.training.data.resolution import CALM, ResolutionControl, ResolutionStep, resolution_steps
from yolov12.training.data.sharing import Sharing

SIZES = {"imgsz": 128, "mas_min_imgsz": 32}


def test_resolution_steps_go_down_in_strides_to_the_smallest_size():
    assert resolution_steps(128, 40, 32) == (ResolutionStep(128, 1.0), ResolutionStep(96, 0.5), ResolutionStep(64, 0.0))
    assert resolution_steps(64, 320, 32) == (ResolutionStep(64, 1.0),)


@pytest.fixture
def memory(monkeypatch):
    """Device on which images up to `memory.size` pixels fit; tests set this attribute."""
    memory = SimpleNamespace(size=10**6, asked=[])
    run = Engine._run

    def within(engine, batch, *more):
        if batch["img"].shape[-1] > memory.size:
            raise DoesNotFitError("more than there is")
        return run(engine, batch, *more)

    def would_fit(engine, height, width, *, whole_group):
        memory.asked.append(whole_group)
        return height <= memory.size

    monkeypatch.setattr(Engine, "_run", within)
    monkeypatch.setattr(Engine, "would_fit", would_fit)
    return memory


def sizes(run):
    return [int(row["image_size"].split("x")[0]) for row in run.memory]


def test_images_get_smaller_if_nothing_else_fits_and_larger_again(trainings, tmp_path, memory):
    memory.size = 64
    steps = []

    def more_after_six(trainer):
        steps.append(trainer.epoch)
        if len(steps) == 6:
            memory.size = 10**6

    run = trainings.train(
        tmp_path, **trainings.SPLIT, **SIZES, epochs=8, callbacks=[("on_train_batch_end", more_after_six)]
    )
    events = [event for row in run.memory for event in row["events"].split("; ") if event]
    assert events == [
        *("image size 128 to 96", "image size 96 to 64"),
        *("image size 64 to 96", "image size 96 to 128"),
    ]
    calm = sizes(run).index(128) - sizes(run).index(96)
    assert sizes(run) == [64] * (6 + calm) + [96] * calm + [128] * (32 - 6 - 2 * calm)
    assert calm == CALM
    assert {size for _, size, _ in run.seen} == {64, 96, 128}
    assert (run.summary["updates"], run.summary["images_lost"]) == (8 * trainings.BATCHES, 0)
    assert run.args["imgsz"] == 128
    assert not any(memory.asked)


def test_mode_off_ends_in_the_error(trainings, tmp_path, memory):
    memory.size = 96
    trainings.train(tmp_path, **trainings.SPLIT, **SIZES, mas_data="off", raises=DoesNotFitError)


def test_the_smallest_size_is_the_last_resort(trainings, tmp_path, memory):
    memory.size = 32
    # The default smallest size is half of imgsz.
    trainings.train(tmp_path, **trainings.SPLIT, imgsz=128, raises=DoesNotFitError)
    run = trainings.train(tmp_path, **trainings.SPLIT, **SIZES, epochs=1)
    assert set(sizes(run)) == {32}


def test_eager_looks_at_the_memory_before_every_batch(trainings, tmp_path, memory):
    memory.size = 64
    run = trainings.train(tmp_path, **trainings.SPLIT, **SIZES, epochs=1, mas_data="eager")
    assert sizes(run) == [64] * trainings.BATCHES  # one step down for the free memory, and one as the batch did not fit
    assert all(memory.asked)


def test_multi_scale_draws_sizes_around_the_current_size(trainings, tmp_path, memory):
    """Otherwise `multi_scale` would enlarge images that were made smaller."""
    memory.size = 64
    run = trainings.train(tmp_path, **trainings.SPLIT, **SIZES, epochs=2, multi_scale=0.5)
    assert max(size for _, size, _ in run.seen) <= 96


@pytest.mark.parametrize("version", [1, 2])
def test_a_resumed_run_keeps_its_image_size(trainings, tmp_path, memory, version):
    memory.size = 64

    def stop(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    cut = trainings.train(
        tmp_path,
        **trainings.SPLIT,
        **SIZES,
        epochs=3,
        callbacks=[("on_train_batch_end", stop)],
        raises=KeyboardInterrupt,
    )
    if version == 1:
        file = cut.folder / "weights" / "state.pt"
        state = torch.load(file, weights_only=True)
        step = state.pop("resolution")
        state |= {"version": 1, "data_layer": {"rung": step.pop("step"), **step}}
        state["loader"]["rungs"] = state["loader"].pop("resolution_steps")
        torch.save(state, file)
    run = trainings.train(tmp_path, cut.folder / "weights" / "last.pt", resume=True)
    assert "resume: epoch 2, after batch 1 of 4" in run.log
    assert set(sizes(run)) == {64}
    assert sum("image size" in row["events"] for row in run.memory) == 1


@pytest.mark.parametrize(
    "wrong", [{"mas_data": "sometimes"}, {"mas_min_imgsz": "small"}, {"mas_min_imgsz": 0}, {"save_every": "5 parsecs"}]
)
def test_wrong_settings_are_refused_before_anything_begins(tiny_model, tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        YOLO(tiny_model).train(data="demo", project=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def data(tmp_path_factory, trainings):
    return check_det_dataset(trainings.draw_data(tmp_path_factory.mktemp("data") / "set", sizes=[(64, 64), (48, 80)]))


def loaded(data, workers, control=None):
    """Return a loader of 4 batches of 4 images of 128 pixels, which mixes every image at full size."""
    init_seeds(1, deterministic=False)
    cfg = get_cfg(overrides={"imgsz": 128, "mosaic": 1.0, "mixup": 1.0})
    dataset = build_yolo_dataset(cfg, data["train"], 4, data)
    if control is not None:
        control.join(dataset, cfg)
    return build_dataloader(dataset, 4, workers, device="cpu")


def a_control(mode="auto"):
    return ResolutionControl(mode, resolution_steps(128, 64, 32), 32)


@pytest.mark.parametrize("mode", ["auto", "eager", "off"])
def test_larger_images_than_asked_for_are_not_touched_at_full_size(mode):
    """The user's own data set may load larger images."""
    batch = {"img": torch.zeros(1, 3, 256, 256)}
    assert a_control(mode).before(batch, lambda size: True) is batch


@pytest.mark.parametrize("workers", [0, 2])
def test_with_enough_memory_images_are_the_same_to_the_byte(data, workers):
    batches = {}
    for mode in ("auto", "eager", "off", None):
        control = a_control(mode) if mode else None
        loader = loaded(data, workers, control)
        batches[mode] = [
            (control.before(batch, lambda size: True) if control else batch)["img"]
            for batch in itertools.chain(loader, loader)
        ]
        loader.close()
    for mode in ("auto", "eager", "off"):
        assert all(map(torch.equal, batches[mode], batches[None]))


def test_workers_follow_the_resolution_step_without_a_restart(data):
    control = a_control()
    loader = loaded(data, 2, control)
    sides = [max(next(iter(loader))["img"].shape)]
    workers = [worker.pid for worker in loader.iterator._workers]
    assert control.smaller({"img": torch.zeros(1, 3, 128, 128, dtype=torch.uint8)})["img"].shape[-1] == 96
    assert control.smaller({"img": torch.zeros(1, 3, 96, 64, dtype=torch.uint8)})["img"].shape[-2:] == (64, 64)
    assert control.smaller({"img": torch.zeros(1)}) is None
    for _ in range(5):
        sides += [batch["img"].shape[-1] for batch in loader]
    assert sides[0] == 128
    assert set(sides[-4:]) == {64}
    assert [worker.pid for worker in loader.iterator._workers] == workers
    loader.close()


def test_mixing_fades_with_the_resolution_steps_and_stays_off_once_closed(data):
    """Mixed images have more boxes."""

    def boxes(loader):
        return sum(len(batch["cls"]) for batch in loader)

    control = a_control()
    loader = loaded(data, 0, control)
    full = boxes(loader)
    control.smaller({"img": torch.zeros(1, 3, 64, 64)})
    half = boxes(loader)
    control.smaller({"img": torch.zeros(1, 3, 64, 64)})
    none = boxes(loader)
    assert full > half > none
    loader.dataset.close_mosaic(get_cfg(overrides={"imgsz": 128}))
    control._shared.value = 1
    assert boxes(loader) <= none


def test_ranks_load_at_the_resolution_step_that_was_settled_when_they_drew_the_batch(data):
    control = a_control()
    loader = loaded(data, 0, control)
    sharing = Sharing(0, 1, 4, 4, 0, resolution_step=lambda: control.step)
    places = Placed(range(4), range(4), [range(4)] * 4)
    drawn = [sharing.split(places, range(4))]
    control.smaller({"img": torch.zeros(1, 3, 128, 128)})
    sharing.taken()
    sharing.observe([RankStatus()])
    drawn.append(sharing.split(places, range(4)))
    load = loader.dataset.__getitems__
    assert [{sample["img"].shape[-1] for sample in load(indices)} for indices in drawn] == [{128}, {96}]
    assert {sample["img"].shape[-1] for sample in load(range(4))} == {96}


@pytest.mark.parametrize("cache", [None, "ram"])
def test_cached_images_get_smaller_and_are_not_cropped(data, cache):
    control = a_control()
    cfg = get_cfg(
        overrides={"imgsz": 128, "mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0, "cache": cache}
    )
    init_seeds(1, deterministic=False)
    dataset = build_yolo_dataset(cfg, data["train"], 16, data)
    control.join(dataset, cfg)
    full = dataset.__getitems__(range(16))
    control.smaller({"img": torch.zeros(1, 3, 128, 128)})
    control.smaller({"img": torch.zeros(1, 3, 128, 128)})
    small = dataset.__getitems__(range(16))
    assert {tuple(sample["img"].shape[1:]) for sample in small} == {(64, 64)}
    for before, after in zip(full, small, strict=True):
        assert torch.allclose(before["bboxes"], after["bboxes"], atol=0.03)


@pytest.mark.parametrize("cache", [None, "ram"])
def test_after_the_return_to_full_size_images_are_those_of_a_run_that_never_left_it(data, cache):
    """Also images that were kept in memory at a smaller size, for mosaic."""
    samples, buffers = {}, {}
    for way in ([0, 0], [2, 0], [1, 2, 1, 0], None):
        init_seeds(1, deterministic=False)
        cfg = get_cfg(overrides={"imgsz": 128, "mosaic": 0.0, "mixup": 0.0, "cache": cache})
        dataset = build_yolo_dataset(cfg, data["train"], 2, data)
        dataset.max_buffer_length = 100  # keeps all images
        control = a_control()
        if way is not None:
            control.join(dataset, cfg)
        for step in way or [0, 0]:
            control._shared.value = step
            init_seeds(2, deterministic=False)
            last = [dataset[index] for index in range(16)] if way is None else dataset.__getitems__(range(16))
        mosaic = get_cfg(overrides={"imgsz": 128, "mosaic": 1.0, "mixup": 1.0})
        dataset.transforms = dataset.build_transforms(mosaic)
        indices = range(16)
        last += [dataset[index] for index in indices] if way is None else dataset.__getitems__(indices)
        samples[str(way)], buffers[str(way)] = [sample["img"] for sample in last], list(dataset.buffer)
    for way, images in samples.items():
        assert all(map(torch.equal, images, samples["None"])), way
        assert buffers[way] == buffers["None"]


def test_one_fall_through_several_resolution_steps_doubles_the_patience_once():
    control = ResolutionControl("auto", resolution_steps(128, 32, 32), 32)
    batch = {"img": torch.zeros(1, 3, 128, 128)}
    control.smaller(batch)
    for _ in range(CALM):
        control.after(lambda size: True)
    assert control.step == 0
    for _ in range(3):
        control.smaller(batch)
    assert (control.step, control.state_dict()["patience"]) == (3, 2 * CALM)
