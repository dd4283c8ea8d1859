"""Classes keep their weights by name, in every branch of every head."""

from types import SimpleNamespace

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, SegmentationModel

from yolov12.errors import ConfigError
from yolov12.training.classes import head
from yolov12.training.classes.names import check_rename, hint, match, renamed
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
    # The segmentation of YOLO26 has a semantic branch, too.
    assert len(now) == {"two branches": 4, "end to end": 4, "segment26": 5}.get(kind, 2)
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


@pytest.mark.parametrize("kind", ["detect", "segment26"])
@pytest.mark.parametrize("names", ["groove,part,crack", "groove,part", "part,groove,Scratch", "a,groove,b"])
def test_a_renamed_class_keeps_its_weights(kind, names):
    """Also if Ultralytics finds no class by name, and copies each row to the class of its number."""
    new = dict(enumerate(names.split(",")))
    before, model = marked(kind, OLD), made(kind, new)
    model.load(before, verbose=False)
    found = head.keep_by_name(model, new, {"Scratch ": "groove", "of another model": "x"})
    old, now = rows_of(before), rows_of(model)
    for layer, (weight, bias) in now.items():
        for index, name in new.items():
            if (counterpart := found.counterparts[index]) is not None:
                assert counterpart == {"groove": 1, "part": 0, "crack": 2}[name]
                assert torch.equal(weight[index], old[layer][0][counterpart])
                assert torch.equal(bias[index], old[layer][1][counterpart])
    assert found.counterparts[names.split(",").index("groove")] == 1
    assert "; renamed: scratch to groove" in str(found)
    assert "scratch" not in found.gone
    assert not found.is_none


def test_two_classes_may_become_one_and_two_may_swap_their_names():
    assert list(renamed(OLD, {"scratch": "crack"}).values()) == ["part", "crack", "crack"]
    assert match(renamed(OLD, {"part": "crack"}), {0: "crack", 1: "scratch"}) == [2, 1]  # crack was there before
    assert match(renamed(OLD, {"part": "crack", "crack": "part"}), OLD) == [2, 1, 0]
    assert renamed(OLD, None) == OLD


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"scrach": "groove"}, r"no old class is called scrach \(did you mean scratch\?\)"),
        ({"Scratch ": "grove"}, r"no class of data= is called grove \(did you mean groove\?\)"),
        ({"xyz": "groove"}, r"no old class is called xyz \(there are part, scratch, crack\)"),
    ],
)
def test_rename_needs_names_of_classes(rename, words):
    check_rename({"Scratch ": "groove"}, OLD.values(), ["groove"])
    with pytest.raises(ConfigError, match=words):
        check_rename(rename, OLD.values(), ["groove"])


def test_names_that_are_almost_the_same_are_pointed_out():
    old = ["scratch", "missing part", "Assembly", "cat", "box"]
    new = ["scratches", "Missing_Parts", "assemblies", "car", "fox", "scratch-es"]
    words = "{'scratch': 'scratches', 'missing part': 'Missing_Parts', 'Assembly': 'assemblies'}"
    assert hint(old, new) == f'rename="{words}"'
    assert hint(["cat"], ["car", "cats and dogs"]) is None
    model = made("detect", {0: "scratches"})
    model.load(marked("detect", OLD), verbose=False)
    assert head.keep_by_name(model, {0: "scratches"}).hint == "rename=\"{'scratch': 'scratches'}\""


def test_weights_that_came_through_a_model_from_a_yaml_are_kept_too():
    """This is `YOLO("yolov12n.yaml").load("best.pt")`: the model has 80 classes without names in between."""
    before, between = marked("end to end", OLD), made("end to end", {index: str(index) for index in range(80)})
    between.load(before, verbose=False)
    assert head.known_names(between) == OLD
    model = made("end to end", new := {0: "crack", 1: "bridge"})
    model.load(between, verbose=False)
    head.start_new(model, head.keep_by_name(model, new))
    for layer, (weight, bias) in rows_of(model).items():
        theirs, bias_of_theirs = rows_of(before)[layer]
        assert torch.equal(weight[0], theirs[2])
        assert torch.equal(bias[0], bias_of_theirs[2])
        assert torch.equal(weight[1], weight[0])  # a new class starts from the mean of the others


def test_a_head_of_another_width_or_place_keeps_no_class():
    """Ultralytics then copies the biases alone, or nothing."""
    wider = made("detect", OLD)
    wider.load(marked("detect", OLD, channels=16), verbose=False)
    assert wider.model[-1].cv3[0][-1].in_channels != 16
    assert head.keep_by_name(wider, OLD) is None
    both = made("end to end", OLD)
    both.load(marked("detect", OLD), verbose=False)  # has one branch only
    assert head.keep_by_name(both, OLD) is None


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
