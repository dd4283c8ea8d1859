"""BatchNorm groups: how a batch is split into them, which size a run takes, and what happens if none fits."""

from __future__ import annotations

from collections.abc import Callable

from yolov12.mas.config import GROUPS
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.scheduler import Decision, State, decide
from yolov12.mas.scheduling.time_model import SpeedModel

__all__ = ["decide_groups", "largest_group", "least_bytes", "split_groups"]


def split_groups(images: int, group: int) -> tuple[int, ...]:
    """Split a batch into BatchNorm groups.

    Each group has `group` images, and the remaining images form a smaller group. If these are fewer than a quarter of a
    group, their statistics would be noise. Then they and the last full group are divided into two groups of about equal
    size. With groups of two or more, no image is alone in a group, because some layers cannot normalise a single image:
    after groups of two, the last three images form one group.

    Args:
        images: Number of images in the batch.
        group: Number of images in a group; 0 for one group of all.

    Returns:
        Number of images in each group.
    """
    full, rest = divmod(images, group) if group else (0, images)
    sizes = [group] * full + [rest] * bool(rest)
    if full and 0 < 4 * rest < max(group, 5):
        last = group + rest
        sizes[-2:] = [last] if last < 4 else [last - last // 2, last // 2]
    return tuple(sizes)


def largest_group(fits: Callable[[int], bool], *, most: int | None = None, micro_batch: int | None = None) -> int:
    """Return the largest BatchNorm group that fits, of those that `bn_group=auto` chooses from, or 1.

    Args:
        fits: Returns whether a group of so many images fits under any checkpoint plan.
        most: Largest group to consider.
        micro_batch: Number of images at once that the user asked for; a group is never larger.
    """
    limits = [limit for limit in (most, micro_batch) if limit is not None]
    return next((group for group in GROUPS if group <= min([group, *limits]) and fits(group)), 1)


def least_bytes(cost: CostModel, features: Features) -> int:
    """Return the bytes of a micro-batch with margin, under the checkpoint plan that needs least.

    Args:
        cost: Model of peak bytes.
        features: Shape of the micro-batch; its level is ignored.
    """
    levels = range(len(cost.levels))
    return min(cost.upper(Features(*features.shape[:3], features.boxes, level))[1] for level in levels)


def decide_groups(
    images: int, group: int, state: Callable[[tuple[int, ...]], State], cost: CostModel, speed: SpeedModel
) -> tuple[Decision, tuple[int, ...], int]:
    """Decide how to run a batch in BatchNorm groups. If no whole group fits, use smaller groups for this batch.

    Args:
        images: Number of images to run.
        group: Number of images in a group; 0 if groups do not matter, so that any number of images can run at once.
        state: Returns the state for groups of these sizes.
        cost: Model of peak bytes.
        speed: Model of times.

    Returns:
        The decision, whose `fits` is False if not even groups of one image fit; the sizes of the groups; and the group
        size by which the batch was split.
    """
    group = group or 1
    while True:
        sizes = split_groups(images, group)
        decision = decide(state(sizes), cost, speed)
        if not decision.fits and max(sizes) > group:  # three images: better one alone than all
            sizes = (*sizes[:-1], 2, 1)
            decision = decide(state(sizes), cost, speed)
        if decision.fits or max(sizes) == 1:
            return decision, sizes, group
        group = max(sizes) // 2
