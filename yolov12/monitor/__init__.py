"""`yolov12 monitor [RUN]` shows the memory of a training in the terminal while it runs: budget, peak, micro-batches.

RUN            folder of the run, as in runs/detect/train; by default the run that was written last
once=True      print one picture and end; without a terminal, this is what happens anyway
every=1        seconds between two pictures

It reads memory.csv of the run as it grows, and nothing else happens to the run. It works over SSH, in 80 x 24
characters and with NO_COLOR. Ctrl-C ends it, and not the training. If the run ends, it says how, and ends too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yolov12.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from yolov12.monitor.follow import Follower

__all__ = ["main"]

_ON, _OFF = ("", "true", "1"), ("false", "0")


@dataclass(frozen=True)
class _Options:
    run: str = ""
    once: bool = False
    every_s: float = 1.0


def main(words: list[str]) -> int:
    """Show a run until it ends or Ctrl-C is pressed.

    Args:
        words: The words after `yolov12 monitor`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        ConfigError: An argument is unknown, or there is no such run.
    """
    from rich.console import Console

    from yolov12.monitor.follow import Follower
    from yolov12.monitor.runs import find

    options = _parse(words)
    follower = Follower(find(options.run))
    console = Console(highlight=False, soft_wrap=True)
    once = options.once or not console.is_terminal or console.is_dumb_terminal
    try:
        if not once:
            _watch(console, follower, options.every_s)
        console.print(_picture(console, follower))
    except KeyboardInterrupt:
        return 130
    return 0


def _watch(console: Console, follower: Follower, every_s: float) -> None:
    """Redraw on the terminal's second screen, which leaves what was on it as it was, until the run ends."""
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_picture(console, follower), refresh=True)
            if follower.state().ended:
                return
            time.sleep(every_s)


def _picture(console: Console, follower: Follower) -> Text:
    from yolov12.monitor.view import render

    follower.read()
    state = follower.state()
    width, height = console.size
    unicode = (console.encoding or "").lower().startswith("utf")
    return render(follower.folder.name, follower.journals(), state, width, height - 1, unicode=unicode)


def _parse(words: list[str]) -> _Options:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not equals and key != "once":
            key, value = "run", word
        if key not in ("run", "once", "every"):
            raise ConfigError(f"unknown argument '{key}'. Arguments of monitor: a run folder, once=True, every=1")
        if key in found:
            raise ConfigError(f"'{word}' is one {key} too many")
        found[key] = value
    once = found.get("once", "false").lower()
    if once not in _ON + _OFF:
        raise ConfigError(f"once={found['once']} is neither True nor False")
    try:
        every_s = float(found.get("every", 1))
    except ValueError:
        every_s = 0
    if not 0.1 <= every_s <= 3600:
        raise ConfigError(f"every={found['every']} is not a number of seconds from 0.1 to 3600")
    return _Options(found.get("run", ""), once in _ON, every_s)
