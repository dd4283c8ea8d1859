"""Callbacks that switch BatchNorm layers during a training leave it as on stock."""

import torch
from torch import nn


class OwnBatchNorm(nn.BatchNorm2d):
    """A BatchNorm layer of the user's own."""

    def forward(self, x):
        return super().forward(x) * 0.5


def replaced(block, layer):
    """Put a layer in place of a block's BatchNorm, with its parameters and statistics."""
    layer.load_state_dict(block.bn.state_dict())
    block.bn = layer.to(block.bn.weight)


def test_layers_that_callbacks_switch_are_trained_as_on_stock(trainings, tmp_path):
    def norms(trainer):
        return [part for part in trainer.model.modules() if hasattr(part, "bn")]

    def batch_starts(trainer):
        first, second, *_ = norms(trainer)
        first.bn.eval()
        second.bn.train(trainer.epoch != 1)

    def batch_ends(trainer):
        norms(trainer)[2].bn.momentum = 0.1 + 0.01 * trainer.epoch

    def epoch_ends(trainer):
        blocks = norms(trainer)
        if trainer.epoch == 0:
            blocks[3].bn.track_running_stats = False
            blocks[4].bn.momentum = None
            blocks[5].bn.requires_grad_(False)
            replaced(blocks[6], nn.BatchNorm2d(blocks[6].bn.num_features, momentum=0.3))
            replaced(blocks[7], OwnBatchNorm(blocks[7].bn.num_features))
        else:
            blocks[3].bn.track_running_stats = True
            blocks[5].bn.requires_grad_(True)

    events = [("on_train_batch_start", batch_starts), ("on_train_batch_end", batch_ends)]
    events.append(("on_train_epoch_end", epoch_ends))
    stock, ours = (
        trainings.train(tmp_path, callbacks=events, epochs=3, **settings)
        for settings in ({"mas": False}, {"bn_group": 8, "micro_batch": 8})
    )
    assert ours.after.keys() == stock.after.keys()
    for name, value in stock.after.items():
        torch.testing.assert_close(
            ours.after[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len([line for line in ours.log.splitlines() if "(OwnBatchNorm) is not PyTorch's own BatchNorm" in line]) == 1
    assert "survived, 0 images lost, 12 of 12 updates" in ours.log
