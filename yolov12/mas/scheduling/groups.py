"""Splits a batch into BatchNorm groups."""

from __future__ import annotations

__all__ = ["split_groups"]


def split_groups(images: int, group: int) -> tuple[int, ...]:
    """Return the sizes of the groups into which a batch is split.

    Groups have `group` images each. The remaining images form a group of their own. If that group would be smaller than
    a quarter of `group`, its statistics would be too noisy; then the last full group and the remaining images are
    divided into two groups of about equal size.

    Args:
        images: Images in the batch.
        group: Images in a group; 0 makes the whole batch one group.
    """
    full, rest = divmod(images, group) if group else (0, images)
    sizes = [group] * full + [rest] * bool(rest)
    # The 5 prevents a group of one image, which some layers cannot normalise.
    if full and 0 < 4 * rest < max(group, 5):
        sizes[-2:] = group + rest - (group + rest) // 2, (group + rest) // 2
    return tuple(sizes)
