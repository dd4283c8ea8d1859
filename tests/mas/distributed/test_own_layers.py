"""Layers of a user's own on two ranks: what they reach on one rank only, and what they write to their buffers."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("own_layers.py")


@pytest.fixture(scope="module")
def outcomes(start_script, reserve_port, tmp_path_factory):
    """Outcomes of all cases of the script, rank 0 first."""
    folder, port = tmp_path_factory.mktemp("outcomes"), str(reserve_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [start_script(SCRIPT, folder, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert [process.communicate()[0] for process in both] == ["", ""]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def case(outcomes, name):
    found = [of_rank[name] for of_rank in outcomes]
    assert not any("error" in each for each in found), found
    return found


@pytest.mark.parametrize("name", ["experts", "dropped", "experts, padding", "experts, updates", "dropped, updates"])
def test_layers_that_run_on_one_rank_only_are_trained_as_in_one_process(outcomes, name):
    wanted = outcomes[0][f"{name} in one process"]
    for found in case(outcomes, name):
        for what, values in wanted.items():
            for key, value in values.items():
                if value is None:
                    assert found[what][key] is None, key
                else:
                    # A rank's gradient is scaled once, by a factor in single precision: 6e-8.
                    torch.testing.assert_close(found[what][key], value, rtol=1e-6, atol=1e-7)


def test_what_no_image_reaches_has_no_gradient(outcomes):
    """A padding image is not part of the batch, whatever it reaches."""
    for name, unreached in (("experts", {"unused"}), ("experts, padding", {"unused", "negative"})):
        for found in case(outcomes, name):
            none = {key.split(".")[1] for key, gradient in found["gradients"].items() if gradient is None}
            assert none == unreached


def test_buffers_that_differ_between_ranks_are_copied_from_rank_0(outcomes):
    first, second = (each["buffers"] for each in case(outcomes, "watching"))
    changed = ("0.mean", "0.wave", "0.count", "0.seen", "0.collected")  # the shape of the last one differs, too
    assert not any(torch.equal(first[name], second[name]) for name in changed)
    for after in case(outcomes, "watching, checked"):
        for name, buffer in first.items():
            assert torch.equal(after["buffers"][name], buffer)


def test_a_run_with_instance_norm_goes_on(outcomes):
    first, second = case(outcomes, "instance norm")
    assert first["buffers"].keys() == second["buffers"].keys()
    for name, buffer in first["buffers"].items():
        assert torch.equal(buffer, second["buffers"][name])
    assert first["buffers"]["1.running_mean"].any()


@pytest.mark.parametrize("what", ["weight", "running mean"])
def test_weights_that_differ_end_the_run(outcomes, what):
    for rank in outcomes:
        assert rank[what]["error"].startswith("RankError: rank 1 (")
        assert "other weights" in rank[what]["error"]


def test_devices_that_differ_get_the_weights_of_rank_0(outcomes):
    first, second = case(outcomes, "weight, not alike")
    for what in ("parameters", "buffers"):
        for name, value in first[what].items():
            assert torch.equal(value, second[what][name])
