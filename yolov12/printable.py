"""Text from files of others, made safe to print.

Class names, paths in a data set yaml and metadata of a model are written by somebody else. On a terminal, a control
character in them can move the cursor, delete lines, or forge a line of the log.
"""

from __future__ import annotations

import re

__all__ = ["printable", "printable_lines"]

# Control characters of ASCII and Latin-1, line separators, what changes the direction of the text after it, and the
# surrogates that stand for bytes of a file name that are not UTF-8: they can be neither printed nor written.
_CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_IN_A_NAME = re.compile(_CONTROL)
_IN_A_MESSAGE = re.compile(rf"(\x1b\[[0-9;]*m|[\n\t])|{_CONTROL}")


def printable(name: str) -> str:
    """Return a name with every control character and line break written as an escape sequence, such as `\\x1b`.

    Args:
        name: A name from a file.
    """
    return _IN_A_NAME.sub(lambda found: ascii(found[0])[1:-1], name)


def printable_lines(message: str) -> str:
    """Return a message of a program with its lines, tabs and colours, and all other control characters as escapes.

    Args:
        message: A message, which may contain text from a file.
    """
    return _IN_A_MESSAGE.sub(lambda found: found[1] or ascii(found[0])[1:-1], message)
