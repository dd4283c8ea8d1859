"""BatchNorm groups of a batch: the sizes it is split into."""

from __future__ import annotations

__all__ = ["split_groups"]


def split_groups(images: int, group: int) -> tuple[int, ...]:
    """Sizes of the groups that so many images are cut into.

    Groups of `group` images; what is left over is a group of its own, unless it would be less than a quarter of one,
    whose statistics would be noise: then it shares evenly with the group before it. `group=0` is one group.
    """
    full, rest = divmod(images, group) if group else (0, images)
    sizes = [group] * full + [rest] * bool(rest)
    if full and 0 < 4 * rest < max(group, 5):  # never one image alone, which some layers cannot normalise
        sizes[-2:] = group + rest - (group + rest) // 2, (group + rest) // 2
    return tuple(sizes)
