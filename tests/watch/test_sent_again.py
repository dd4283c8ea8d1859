"""Images that somebody has deleted from the collection, and sends again with a corrected label."""

import shutil

import pytest

from tests.watch.factory import Work, put

WRONG, RIGHT = "0 0.5 0.5 0.1 0.1", "1 0.5 0.5 0.1 0.1"


@pytest.fixture
def watch(factory):
    factory.deliver(6, WRONG)
    watch = factory.watch(Work(), "min_images=100")
    watch.step()
    return watch


def first_of(watch, factory):
    """Return the first image of the collection and its content."""
    entry = min(watch.collection.entries.values(), key=lambda entry: entry.image)
    return entry, entry.image.read_bytes()


@pytest.mark.parametrize("with_label", [False, True])
def test_an_image_that_was_deleted_is_taken_with_its_new_label(with_label, watch, factory):
    entry, data = first_of(watch, factory)
    entry.image.unlink()
    label = factory.work / "dataset" / "labels" / entry.split / f"{entry.image.stem}.txt"
    if with_label:
        label.unlink()
    put(factory, "0", data, RIGHT)
    watch.step()
    assert [*(factory.work / "rejected").iterdir()] == []
    labels = sorted(path.read_text()[0] for path in (factory.work / "dataset" / "labels").rglob("*.txt"))
    assert labels == [*"000001"]
    assert len([*(factory.work / "dataset" / "images").rglob("*.png")]) == 6
    assert watch.collection.new_by_class() == {"missing": 5, "crack": 1}
    again = factory.watch(Work()).collection
    assert again.entries == watch.collection.entries
    assert again.new_by_class() == watch.collection.new_by_class()


def test_the_last_image_of_a_split_that_was_deleted_is_not_counted(watch, factory):
    for split in ("train", "val"):
        assert watch.collection.is_trainable
        gone = [entry for entry in watch.collection.entries.values() if entry.split == split]
        for number, entry in enumerate(gone):
            data = entry.image.read_bytes()
            entry.image.unlink()
            put(factory, f"again-{number}", data, "no label")
        watch.step()
        assert not watch.collection.is_trainable
        factory.deliver(6)
        watch.step()
    assert watch.collection.new_by_class() == {"missing": len(watch.collection.entries)}


def test_an_image_that_attempts_have_used_is_not_counted_as_new_when_it_is_sent_again(factory):
    factory.deliver(4)
    watch = factory.watch(Work())
    assert watch.run() == 0
    entry, data = first_of(watch, factory)
    entry.image.unlink()
    put(factory, "0", data, RIGHT)
    watch.step()
    assert watch.collection.new_by_class() == {}
    assert len(watch.collection.entries) == 4


def test_images_are_not_forgotten_while_their_folder_is_away(watch, factory):
    entry, data = first_of(watch, factory)
    away = factory.folder / "away"
    shutil.move(entry.image.parent, away)
    put(factory, "0", data, RIGHT)
    watch.step()
    shutil.move(away, entry.image.parent)
    assert len(watch.collection.entries) == 6
    (note,) = (factory.work / "rejected").glob("*.reason.txt")
    assert "the collection has the same image" in note.read_text()
