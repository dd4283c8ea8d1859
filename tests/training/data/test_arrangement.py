"""Groups of a batch have about equally many boxes, whatever their size, and memory does not affect them."""

from hypothesis import given
from hypothesis import strategies as st

from yolov12.training.data.arrangement import arranged
from yolov12.training.data.loader import _Collate

boxes = st.lists(st.one_of(st.integers(0, 40), st.integers(300, 1000)), min_size=1, max_size=300)


@given(boxes)
def test_every_image_has_one_place(boxes):
    assert sorted(arranged(boxes)) == list(range(len(boxes)))


@given(st.integers(3, 8), st.data())
def test_groups_differ_by_less_than_their_fullest_image(power, data):
    images = 2**power
    boxes = data.draw(st.lists(st.integers(0, 1000), min_size=images, max_size=images))
    order = arranged(boxes)
    for group in (2**k for k in range(power)):
        sums = [sum(boxes[i] for i in order[start : start + group]) for start in range(0, images, group)]
        assert max(sums) - min(sums) <= max(boxes) - min(boxes)


def test_the_images_of_a_batch_are_put_in_that_order():
    samples = [{"cls": range(count), "name": str(count)} for count in (1, 9, 2, 7)]
    collate = _Collate(lambda samples: {"names": [sample["name"] for sample in samples]}, True)
    assert collate(samples)["names"] == ["9", "2", "7", "1"]
    assert _Collate(collate.stock, False)(samples)["names"] == ["1", "9", "2", "7"]
