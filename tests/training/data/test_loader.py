"""A resumed loader returns the batches of an uninterrupted one: same images, same augmentation, same order."""

import itertools

import pytest
import torch
from torch.utils.data import WeightedRandomSampler
from ultralytics.cfg import get_cfg
from ultralytics.data.build import InfiniteDataLoader, build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolov12.training.data.loader import SKIPPED, ResumableLoader, resumable
from yolov12.training.data.random_state import random_state, set_random_state

BATCH, EPOCHS, CLOSE = 4, 4, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory, trainings):
    folder = tmp_path_factory.mktemp("data") / "set"
    return check_det_dataset(trainings.draw_data(folder, sizes=[(64, 64), (48, 80), (80, 48)]))


def stock_loader(data, workers, cache=None):
    """Return Ultralytics' loader of 24 images in 6 batches."""
    init_seeds(1, deterministic=False)
    cfg = get_cfg(overrides={"imgsz": 64, "mosaic": 0.8, "mixup": 0.3, "degrees": 5.0, "cache": cache})
    dataset = build_yolo_dataset(cfg, data["train"], BATCH, data)
    dataset.max_buffer_length = 9  # small enough to overflow
    return build_dataloader(dataset, BATCH, workers, shuffle=True, device="cpu")


def loader(data, workers, cache=None):
    return ResumableLoader(stock_loader(data, workers, cache), 64).take_over()


def epochs(loader, first=0):
    """Yield the batches of all epochs, as Ultralytics' loop asks for them."""
    closed = False
    for epoch in range(first, EPOCHS):
        if epoch >= CLOSE and not closed:
            closed = True
            loader.dataset.close_mosaic(get_cfg())
            loader.reset()
        for batch in loader:
            yield epoch, batch


def facts(batch):
    return batch["im_file"], batch["img"], batch["bboxes"], batch["cls"], batch["batch_idx"]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


# In the middle and at the end of an epoch, before every worker has delivered, and after mosaic was closed.
@pytest.mark.parametrize(
    ("workers", "done"), [*itertools.product((0, 2), (1, 3, 6, 9, 12, 13, 17, 18)), (3, 8), (3, 11), (5, 2), (5, 14)]
)
def test_a_resumed_loader_continues_as_if_not_interrupted(data, workers, done, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)  # Ultralytics has no more workers than processors
    whole = loader(data, workers)
    assert whole.num_workers == workers
    expected, state, draws = [], None, None
    for count, (_, batch) in enumerate(epochs(whole), 1):
        expected.append(facts(batch))
        if count == done:
            state, draws = whole.state_dict(), random_state()
    whole.close()

    again = loader(data, workers)
    torch.manual_seed(99)  # earlier random numbers must have no effect
    assert again.load_state_dict(state, lambda: set_random_state(draws))
    seen, skipped = [], 0
    for _, batch in epochs(again, (done - 1) // 6):
        if SKIPPED in batch:
            skipped += 1
        else:
            seen.append(facts(batch))
    again.close()
    assert skipped == (done - 1) % 6 + 1
    assert len(seen) == len(expected) - done
    assert all(map(same, seen, expected[done:]))


def test_a_resumed_loader_can_be_resumed_again(data):
    """The loader is interrupted a second time, before and after every worker has delivered."""
    whole = loader(data, 2)
    expected = [facts(batch) for _, batch in itertools.islice(epochs(whole), 12)]
    whole.close()
    state, seen = None, []
    for done in (2, 3, 5, 8, 12):
        part = loader(data, 2)
        if state is not None:
            assert part.load_state_dict(state, lambda: None)
        real = (batch for _, batch in epochs(part, max(len(seen) - 1, 0) // 6) if SKIPPED not in batch)
        seen += [facts(batch) for batch in itertools.islice(real, done - len(seen))]
        state = part.state_dict()
        part.close()
    assert all(map(same, seen, expected))


def test_the_first_batches_are_those_of_ultralytics(data, trainings):
    """Their order is stock's, and with the same random draws, their content is, too."""
    ours = loader(data, 2)
    batches = list(ours)
    ours.close()
    for by_place in (False, True):
        stock = stock_loader(data, 2)
        if by_place:
            trainings.draw_by_place(stock)
        for batch, other in zip(batches, stock, strict=True):
            assert batch.keys() == other.keys()
            assert batch["im_file"] == other["im_file"]
            assert same(facts(batch), facts(other)) == by_place
            assert not by_place or all(batch[key] == other[key] for key in ("ori_shape", "resized_shape", "ratio_pad"))
        stock.close()


def test_a_state_of_an_older_version_is_reported_as_it_changes_augmentation(data):
    whole = loader(data, 0)
    order = [batch["im_file"] for batch in whole]
    begun = loader(data, 2)
    next(iter(begun))
    state = {**begun.state_dict(), "workers": [{"seed": 1}, {"seed": 2}], "buffer": []}
    begun.close()
    del state["epoch"]
    other = loader(data, 0)
    assert not other.load_state_dict(state, lambda: None)
    assert [batch["im_file"] for batch in other if SKIPPED not in batch] == order[1:]


def test_the_state_survives_a_file_that_is_loaded_with_weights_only(data, tmp_path):
    begun = loader(data, 2)
    list(itertools.islice(iter(begun), 3))
    torch.save({"loader": begun.state_dict(), "random": random_state()}, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read["loader"]["position"] == 3
    set_random_state(read["random"])
    begun.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_of_other_kinds_are_left_alone(data, workers):
    stock = stock_loader(data, workers)
    generator = torch.Generator()
    plain = torch.utils.data.DataLoader(stock.dataset, BATCH, shuffle=True, generator=generator)
    weighted = InfiniteDataLoader(
        stock.dataset, batch_size=BATCH, generator=generator, sampler=WeightedRandomSampler([1.0] * 24, 24)
    )
    assert [resumable(each) for each in (stock, plain, weighted)] == [True, False, False]


class Looking:
    """A user's callbacks that take batches from the training's loader, with many iterators."""

    def __init__(self, loader):
        self.loader, self.seen = loader, []

    def __call__(self, event):
        loader, seen = self.loader, self.seen
        if event == "start":
            seen += [next(iter(loader)), *loader]
        elif event == "epoch start":
            self.kept = iter(loader)
            iter(loader)  # never used
        elif event == "batch end":
            seen.append(next(self.kept, None))
        else:
            seen += [next(iter(loader)), *itertools.islice(loader, 2)]


def train(loader, done=0, state=None, draws=None):
    """Take batches as Ultralytics' loop does, while a user's callbacks take others.

    Args:
        loader: Training loader.
        done: Number of batches that were trained on before an interruption.
        state: State of the loader at that time, for a run that resumes.
        draws: State of the random generators at that time.

    Returns:
        Batches of the loop and of the callbacks, and after each batch the number of the latter, and both states.
    """
    user, trained, moments = Looking(loader), [], {}
    closed, first = False, 0
    if done:
        torch.manual_seed(99)  # earlier random numbers must have no effect
        assert loader.load_state_dict(state, lambda: set_random_state(draws))
        first = (done - 1) // 6
    loader.is_loops = False
    user("start")
    for epoch in range(first, EPOCHS):
        user("epoch start")
        loader.is_loops = True
        iter(loader)  # never used
        if epoch >= CLOSE and not closed:
            closed = True
            loader.dataset.close_mosaic(get_cfg())
            loader.reset()
        for position, batch in enumerate(iter(loader), epoch * 6 + 1):
            loader.is_loops = False
            if SKIPPED not in batch:
                trained.append(facts(batch))
            elif position == done:
                loader.repeated()
            if isinstance(loader, ResumableLoader) and SKIPPED not in batch:
                moments[position] = len(user.seen), loader.state_dict(), random_state()
            user("batch end")
        user("epoch end")
    loader.close()
    return trained, [batch and facts(batch) for batch in user.seen], moments


@pytest.fixture(scope="module", params=[0, 2])
def looked_at(data, request):
    """Number of workers, and outcome of a whole run with users' iterators."""
    return request.param, *train(loader(data, request.param))


def same_batches(these, those):
    pairs = zip(these, those, strict=True)
    return all(one is other if one is None or other is None else same(one, other) for one, other in pairs)


def test_users_iterators_move_the_training_as_they_do_on_stock(data, looked_at, trainings):
    _, trained, seen, _ = looked_at
    assert len(trained) == 6 * EPOCHS
    stock = stock_loader(data, 0)
    trainings.draw_by_place(stock)
    stock_trained, stock_seen, _ = train(stock)
    assert same_batches(trained, stock_trained)
    assert same_batches(seen, stock_seen)


# Within an epoch and at its end, before and after mosaic is closed.
@pytest.mark.parametrize("done", [3, 6, 12, 14])
def test_a_run_with_users_iterators_resumes_as_if_not_interrupted(data, looked_at, done):
    workers, trained, seen, moments = looked_at
    before, *states = moments[done]
    again, seen_again, _ = train(loader(data, workers), done, *states)
    assert same_batches(again, trained[done:])
    repeated = len(seen_again) - len(seen[before:])  # by callbacks of the epoch that was interrupted
    assert repeated > 0
    assert None not in seen_again[:7]
    assert same_batches(seen_again[repeated:], seen[before:])


def test_callbacks_of_a_training_can_iterate_over_its_loader(trainings, tmp_path):
    """Samples, order, results and weights are those of stock, also of a run that was interrupted and resumed."""
    events = ("on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end", "on_fit_epoch_end")

    def look(trainer):
        assert len(next(iter(trainer.train_loader))["img"]) == 8

    def cut_power(trainer):
        if trainer.epoch == 1 and trainer.train_loader.position == 2:
            raise PowerCutError

    looks = [(event, look) for event in events]
    settings = {"epochs": 3, "close_mosaic": 1, "bn_group": 8, "micro_batch": 8}
    stock = trainings.train(tmp_path / "stock", callbacks=looks, mas=False, **settings)
    whole = trainings.train(tmp_path, callbacks=looks, **settings)
    assert whole.sums == stock.sums
    assert whole.stock_results() == stock.stock_results()
    parameters = dict(whole.trainer.model.named_parameters())
    assert all(torch.equal(value, stock.after[name]) for name, value in parameters.items())

    cut = [*looks, ("on_train_batch_end", cut_power)]
    begun = trainings.train(tmp_path, callbacks=cut, raises=PowerCutError, **settings)
    last = begun.folder / "weights" / "last.pt"
    resumed = trainings.train(tmp_path, last, callbacks=looks, resume=True)
    assert begun.sums + resumed.sums == whole.sums
    assert all(torch.equal(value, whole.after[name]) for name, value in resumed.after.items())


class PowerCutError(Exception):
    """Power cut in the middle of an epoch."""
