"""State files and tables that a resume cannot go on from: it says why, and runs nothing in them."""

import os

import pytest
import torch

from yolov12.training.run import result_rows


def test_a_state_of_other_batches_is_not_gone_on_from(trainings, interrupted, tmp_path):
    folder = interrupted()
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True, batch=16)
    assert "2 batches, not 4, 16 images at once, not 8. Going on from the end of an epoch" in again.log
    assert len(again.results) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("ema"), "it is of another version, or not a state of this package"),
        (lambda state: state.pop("resolution"), "it is of another version, or not a state of this package"),
        (lambda state: state["model"].update({"model.0.conv.weight": torch.zeros(2)}), "it is of another model"),
    ],
)
def test_a_state_that_is_not_of_this_training_is_not_gone_on_from(trainings, interrupted, tmp_path, change, reason):
    folder = interrupted()
    file = folder / "weights" / "state.pt"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert f"{file} is not used: {reason}. Going on from the end of an epoch" in again.log
    assert len(again.results) == 2


def test_a_state_that_would_run_code_is_not_read(trainings, interrupted, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = interrupted()
    torch.save({"epoch": Evil()}, folder / "weights" / "state.pt")
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert "it cannot be read (UntrustedWeightsError). Going on from the end of an epoch" in again.log
    assert not (tmp_path / "pwned").exists()
    assert len(again.results) == 2


def test_a_state_that_is_older_than_the_checkpoint_is_not_gone_on_from(trainings, tmp_path, cut, power):
    run = cut(tmp_path, batch=2, epochs=3)
    old = (run.folder / "weights" / "state.pt").read_bytes()
    last = run.folder / "weights" / "last.pt"
    cut_again = trainings.train(tmp_path, last, resume=True, callbacks=power.cut_at(10), raises=power.CutError)
    assert cut_again.folder == run.folder
    (run.folder / "weights" / "state.pt").write_bytes(old)
    again = trainings.train(tmp_path, last, resume=True)
    assert "resume: epoch" not in again.log
    assert len(again.results) == 3


def test_a_program_in_place_of_a_state_is_not_run(trainings, interrupted, tmp_path):
    """PyTorch 2.3 runs an archive of TorchScript in its interpreter, even with `weights_only`."""

    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.zeros(1)

        @torch.jit.export
        def __getstate__(self):
            return (self.x, True)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.x = state[0]
            self.training = state[1]
            assert False, "ran"  # noqa: B011, PT015

        def forward(self):
            return self.x

    folder = interrupted()
    torch.jit.script(Program()).save(str(folder / "weights" / "state.pt"))
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert "it cannot be read (UnreadableWeightsError)" in again.log
    assert len(again.results) == 2


def test_a_state_of_other_images_is_not_gone_on_from(trainings, tmp_path, cut):
    data = trainings.draw_data(tmp_path / "set", sizes=[(64, 64), (48, 80)])
    run = cut(tmp_path, data=data, batch=3)
    image = tmp_path / "set" / "images" / "0.png"
    image.rename(image.with_name("new.png"))
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True)
    assert "checksum of their names" in again.log


def test_an_empty_table_is_no_obstacle(trainings, interrupted, tmp_path):
    folder = interrupted()
    (folder / "results.csv").write_text("")
    again = trainings.train(tmp_path, folder / "weights" / "last.pt", resume=True)
    assert [row["epoch"] for row in again.results] == [2]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        ("1,5,0.1\n2,6,0.2\n3,7,0.3\n", "1,5,0.1\n2,6,0.2\n"),
        ("1,5,0.1\n2,6,0.2\n1", "1,5,0.1\n2,6,0.2\n"),  # epoch 10, cut off by a full disk
        ("1,5,0.1\n2,6,0.2\n\0\0\0\n", "1,5,0.1\n2,6,0.2\n"),  # zeros of a power cut
        ("1,5,0.1\n\n2,6,0.2\n\xff,\n", "1,5,0.1\n2,6,0.2\n"),
    ],
)
def test_damaged_rows_of_a_table_are_dropped(tmp_path, damage, kept):
    file = tmp_path / "results.csv"
    file.write_text(f"epoch,time,loss\n{damage}", encoding="latin-1")
    result_rows.drop_rows(file, 2)
    assert file.read_text() == f"epoch,time,loss\n{kept}"
