"""Classes keep their weights by name, in every branch of every head."""

from types import SimpleNamespace

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel

from yolov12.training.classes import head
from yolov12.training.classes.names import match
from yolov12.training.run import setup

OLD = dict(enumerate(["part", "scratch", "crack"]))
CHANGES = {
    "more": ["part", "scratch", "crack", "bridge", "missing"],
    "fewer": ["part", "crack"],
    "renamed": ["part", "groove", "crack"],
    "reordered": ["crack", "part", "scratch"],
    "all at once": ["missing", "Crack ", "part", "bridge"],
}
KINDS = {
    "detect": (DetectionModel, ("Detect", ["nc"])),
    "two branches": (DetectionModel, ("v10Detect", ["nc"])),
    "end to end": (DetectionModel, ("Detect", ["nc"])),
    "segment": (SegmentationModel, ("Segment", ["nc", 8, 16])),
    "segment26": (SegmentationModel, ("Segment26", ["nc", 8, 16])),
    "pose": (PoseModel, ("Pose", ["nc", "kpt_shape"])),
    "obb": (OBBModel, ("OBB", ["nc", 1])),
}


def yaml_of(layers: tuple[str, list], channels: int = 8, **keys) -> dict:
    kind, arguments = layers
    backbone = [[-1, 1, "Conv", [channels, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    return {"kpt_shape": [3, 3], "backbone": backbone, "head": [[[0, 1], 1, kind, arguments]], **keys}


def made(kind: str, names: dict[int, str], channels: int = 8):
    """A model for classes of these names; every class of it has weights of its own."""
    build, layers = KINDS[kind]
    keys = {"end2end": True} if kind in ("end to end", "segment26") else {}
    model = build({**yaml_of(layers, channels, **keys), "nc": len(names)}, nc=len(names), verbose=False)
    model.names = names
    return model


def rows_of(model) -> dict:
    return {name: (weight.detach().clone(), bias.detach().clone()) for name, weight, bias in head._rows(model)}


def marked(kind: str, names: dict[int, str], channels: int = 8):
    model = made(kind, names, channels)
    for _, weight, bias in head._rows(model):
        torch.nn.init.normal_(weight)
        torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, "all at once") for kind in KINDS), *(("end to end", change) for change in list(CHANGES)[:-1])],
)
def test_classes_keep_their_weights_by_name_in_every_branch(kind, change):
    new = dict(enumerate(CHANGES[change]))
    before, model = marked(kind, OLD), made(kind, new)
    fresh = rows_of(model)
    model.load(before, verbose=False)
    found = head.keep_by_name(model, new)
    old, now = rows_of(before), rows_of(model)
    assert len(now) == (4 if kind in ("two branches", "end to end", "segment26") else 2)
    ids = {name: index for index, name in OLD.items()}
    for layer, (weight, bias) in now.items():
        for index, name in new.items():
            counterpart = ids.get(name.strip().lower())
            expected = fresh[layer] if counterpart is None else old[layer]
            at = index if counterpart is None else counterpart
            assert torch.equal(weight[index], expected[0][at]), (layer, name)
            assert torch.equal(bias[index], expected[1][at]), (layer, name)
    assert found.counterparts == tuple(ids.get(name.strip().lower()) for name in new.values())
    assert set(found.gone) == {
        name for name in OLD.values() if name not in {each.strip().lower() for each in new.values()}
    }


def test_a_class_branch_that_was_wider_is_kept_with_all_its_weights():
    old = {index: f"class {index}" for index in range(30)}  # more than the channels of the first feature map
    before = marked("end to end", old)
    model = made("end to end", (new := {0: "class 7", 1: "other"}))
    assert model.model[-1].cv3[0][-1].in_channels == 8
    model.load(before, verbose=False)
    head.keep_by_name(model, new)
    for branch in ("cv3", "one2one_cv3"):
        kept, source = getattr(model.model[-1], branch), getattr(before.model[-1], branch)
        for layers, theirs in zip(kept, source, strict=True):
            assert layers[-1].in_channels == 30
            assert torch.equal(layers[-1].weight[0], theirs[-1].weight[7])
            assert all(map(torch.equal, layers[:-1].state_dict().values(), theirs[:-1].state_dict().values()))


def test_letters_in_both_cases_are_classes_of_their_own():
    letters = dict(enumerate("aAbB"))
    before, model = marked("end to end", letters), made("end to end", letters)
    model.load(before, verbose=False)
    assert not torch.equal(rows_of(model)["model.2.cv3.0"][0], rows_of(before)["model.2.cv3.0"][0])  # Ultralytics' own
    assert head.keep_by_name(model, letters).is_none
    for (weight, bias), (theirs, bias_of_theirs) in zip(rows_of(model).values(), rows_of(before).values(), strict=True):
        assert torch.equal(weight, theirs)
        assert torch.equal(bias, bias_of_theirs)


def test_rows_that_ultralytics_gave_to_the_right_class_are_left_alone():
    before, model = marked("detect", OLD), made("detect", dict(reversed(OLD.items())))
    model.load(before, verbose=False)
    for _, weight, _ in head._rows(model):
        torch.nn.init.zeros_(weight)  # by a user's `get_model`
    assert head.keep_by_name(model, OLD).is_none
    assert all(not weight.any() for weight, _ in rows_of(model).values())


@pytest.mark.parametrize(
    ("source", "names"), [(None, OLD), ({0: "0", 1: "1", 2: "2"}, OLD), (OLD, {0: "0", 1: "1", 2: "2"})]
)
def test_without_names_nothing_is_compared(source, names):
    model = made("detect", names)
    if source is not None:
        model.load(marked("detect", source), verbose=False)
    assert head.keep_by_name(model, names) is None


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            "part,bridge,crack",
            "2 of 3 classes keep their weights, found by name; new: bridge; no longer there: scratch",
        ),
        ("a,b", "no class of the data has the name of one of the model's 3 classes"),
        (
            "a,b,c",
            "no class of the data has the name of one of the model's 3 classes: each keeps the weights of its number",
        ),
        (
            "part,scratch,crack,c,d,e,f,g,h,i,j,k,l",
            "3 of 13 classes keep their weights, found by name; new: c, d, e, f, g, h, i, j and 2 more",
        ),
    ],
)
def test_the_line_says_what_happens_to_the_classes(names, text):
    new = dict(enumerate(names.split(",")))
    model = made("detect", new)
    model.load(marked("detect", OLD), verbose=False)
    assert str(head.keep_by_name(model, new)) == text


@pytest.mark.parametrize("kind", ["detect", "end to end"])
def test_new_classes_start_from_the_mean_of_the_known_ones(kind):
    new = dict(enumerate(["bridge", "crack", "part", "missing"]))
    model = made(kind, new)
    model.load(marked(kind, OLD), verbose=False)
    before = rows_of(model)
    head.start_new(model, head.keep_by_name(model, new))
    for layer, (weight, bias) in rows_of(model).items():
        assert torch.equal(weight[[1, 2]], before[layer][0][[1, 2]])
        assert torch.equal(bias[[1, 2]], before[layer][1][[1, 2]])
        for index in (0, 3):
            torch.testing.assert_close(weight[index], weight[[1, 2]].mean(0))
            torch.testing.assert_close(bias[index], bias[[1, 2]].mean())


def test_classes_that_are_the_same_are_left_as_they_are():
    model = made("detect", OLD)
    model.load(marked("detect", OLD), verbose=False)
    before = rows_of(model)
    head.start_new(model, head.keep_by_name(model, OLD))
    assert all(torch.equal(weight, before[layer][0]) for layer, (weight, _) in rows_of(model).items())


def test_a_silent_class_is_never_predicted():
    model = marked("end to end", OLD).eval()
    head.silence(model, [1])
    scores = model(torch.rand(1, 3, 64, 64))[1]
    for branch in ("one2many", "one2one"):
        best = scores[branch]["scores"].sigmoid().amax((0, 2))
        assert best[1] == 0
        assert (best[[0, 2]] > 0).all()


def test_names_match_exactly_or_else_in_any_case_and_no_class_twice():
    new = SimpleNamespace(names=dict(enumerate(["A", " b", "B", "c", "C", "d"])))
    assert match({0: "a", 1: "b", 2: "c", 3: "e"}, new.names) == [0, 1, None, 2, None, None]


def test_a_model_can_be_set_up_with_arguments_of_somebody_else():
    """Ultralytics' own tests call it with a few names only."""
    trainer = SimpleNamespace(args=SimpleNamespace(pretrained=False), model=None)
    assert setup.setup_model(lambda trainer: "checkpoint", trainer) == "checkpoint"
