"""`torchrun` with the exit statuses of `yolov12`: `python -m yolov12.torchrun --nproc-per-node 8 -m yolov12 train ...`.

PyTorch's own `torchrun` has status 1 however a training ends, and it restarts processes whose arguments are wrong.
This one does not restart processes after one of them has ended with status 2, and then its own status is 2. After a
signal its status is 128 plus the number of the signal. All arguments are those of `torchrun`.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

__all__ = ["main"]

_REFUSED = 2


class _Agent(api.LocalElasticAgent):
    """Launcher's agent that starts no processes again after one of them has refused its arguments."""

    def _monitor_workers(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._monitor_workers(*args, **kwargs)
        if _has_refused(found.failures):
            self._remaining_restarts = 0
        return found


def _has_refused(failures: dict[int, Any]) -> bool:
    return any(failure.exitcode == _REFUSED for failure in failures.values())


def main(args: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        args: Arguments of `torchrun`. None stands for the arguments of this process.

    Returns:
        The exit status: 0, 1, 2, 130 or 143.
    """
    stock = api.LocalElasticAgent
    api.LocalElasticAgent = _Agent  # type: ignore[misc]
    try:
        run.main(args)
    except ChildFailedError as error:  # PyTorch has logged which processes failed
        return _REFUSED if _has_refused(error.failures) else 1
    except SignalException as error:
        return 128 + error.sigval
    finally:
        api.LocalElasticAgent = stock  # type: ignore[misc]
    return 0


if __name__ == "__main__":
    sys.exit(main())
