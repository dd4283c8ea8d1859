"""Parts of a batch are copied to the device, which is the CPU here."""

from types import SimpleNamespace

import pytest
import torch

from yolov12.mas.step.prefetch import Prefetch
from yolov12.mas.step.retry import IN_A_COPY

CPU = torch.device("cpu")


def test_a_part_keeps_the_structure_of_the_batch():
    marker = SimpleNamespace()

    def part_of(start, stop):
        images = torch.arange(10.0)[start:stop]
        return {"img": images, "pair": (images + 1, [images + 2, "name"]), "files": ["a", "b"], "other": marker}

    part = Prefetch(CPU, part_of).get(2, 5)
    assert part["img"].tolist() == [2, 3, 4]
    assert part["pair"][0].tolist() == [3, 4, 5]
    assert part["pair"][1][0].tolist() == [4, 5, 6]
    assert part["pair"][1][1] == "name"
    assert part["files"] == ["a", "b"]
    assert part["other"] is marker


def test_parts_are_those_asked_for_whatever_was_prefetched():
    parts = Prefetch(CPU, lambda start, stop: torch.arange(10)[start:stop])
    assert parts.get(0, 4).tolist() == [0, 1, 2, 3]
    parts.prefetch(4, 8)
    assert parts.get(4, 6).tolist() == [4, 5]
    parts.prefetch(6, 8)
    parts.drop()
    assert parts.get(6, 8).tolist() == [6, 7]


def test_a_failed_allocation_reaches_the_caller():
    def part_of(start, stop):
        raise MemoryError

    with pytest.raises(MemoryError):
        Prefetch(CPU, part_of).get(0, 1)


@pytest.mark.parametrize("error", [MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")])
def test_a_part_that_cannot_be_copied_ahead_is_copied_when_it_is_needed(error, monkeypatch):
    stream, errors, notes = SimpleNamespace(wait_stream=lambda other: None), [error], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def part_of(start, stop):
        if errors:
            raise errors.pop()
        return (start, stop)

    parts = Prefetch(CPU, part_of, notes.append)
    parts._stream = stream
    parts.prefetch(0, 2)
    assert notes == [IN_A_COPY]
    assert parts.get(0, 2) == (0, 2)


def test_changing_a_part_in_place_does_not_change_the_batch():
    """A failed micro-batch runs again from the batch, even if the loss has scaled its images in place."""
    batch = torch.ones(4)
    Prefetch(CPU, lambda start, stop: batch[start:stop]).get(0, 2).mul_(5)
    assert batch.tolist() == [1, 1, 1, 1]
