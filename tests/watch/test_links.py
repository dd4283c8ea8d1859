"""Links to the model and the inbox may be changed while a watch runs."""

from tests.watch.factory import Work, go_to
from yolov12.watch.phases import Outcome, Phase


def test_a_link_to_the_model_that_leads_elsewhere_is_a_replaced_model(factory):
    old, new = factory.folder / "v1.pt", factory.folder / "v2.pt"
    old.write_text("first")
    new.write_text("by hand")
    factory.serving.unlink()
    factory.serving.symlink_to(old)
    factory.deliver(4)
    watch = factory.watch(Work())
    go_to(watch, Phase.TRAINING)
    factory.serving.unlink()
    factory.serving.symlink_to(new)
    assert watch.run() == 0
    assert (old.read_text(), new.read_text(), watch.state.outcome) == ("first", "by hand", Outcome.NOT_PROMOTED)
    factory.deliver(4)
    assert factory.watch(Work()).run() == 0
    assert factory.serving.is_symlink()
    assert new.read_text().startswith("candidate")
    assert old.read_text() == "first"
    assert factory.work.is_dir()  # beside the link
    (factory.folder / "v2-watch").mkdir()  # of another watch
    assert factory.request().work == factory.work


def test_an_inbox_is_the_folder_that_its_link_leads_to_now(factory):
    first, second = factory.folder / "first", factory.folder / "second"
    factory.inbox.rename(first)
    second.mkdir()
    factory.inbox.symlink_to(first)
    factory.deliver(1)
    watch = factory.watch(Work())
    (pair,) = watch.inbox.complete(factory.now)
    assert pair.image.parent == pair.label.parent == first.resolve()  # also if the link changes before they are moved
    watch.step()
    factory.inbox.unlink()
    factory.inbox.symlink_to(second)
    factory.deliver(3)
    assert watch.run() == 0
    assert [*second.iterdir()] == []
    assert len(factory.attempts()) == 1
