"""Every way this package can refuse to go on. All messages say what happened and what to do.

YOLOv12Error
├── ConfigError                 an argument that cannot work (also a ValueError)
├── DataError                   a data set that cannot be used (also a ValueError)
├── WeightsError                a weight file that is missing or unreadable
│   └── UntrustedWeightsError  a weight file that asks for code we do not run
├── ExportError                 an exported graph that its builder refuses
├── DoesNotFitError             not even one image fits into memory (also a MemoryError)
├── RankError                   another process of a training on several devices failed or is gone
└── SeamError                   the installed Ultralytics lacks something we join (also an ImportError)
"""


class YOLOv12Error(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(YOLOv12Error, ValueError):
    """An argument is unknown, malformed, or cannot work on this machine."""


class DataError(YOLOv12Error, ValueError):
    """A data set is missing, empty, or malformed."""


class WeightsError(YOLOv12Error):
    """A weight file is missing, unreadable, or not a checkpoint."""


class UntrustedWeightsError(WeightsError):
    """A weight file refers to code outside the allow-list, so loading it would run that code."""


class ExportError(YOLOv12Error):
    """A builder refuses an exported graph, for another reason than memory."""


class DoesNotFitError(YOLOv12Error, MemoryError):
    """Not even one image fits into the memory there is; the message says how much it needs and what to do."""


class RankError(YOLOv12Error):
    """Another process of a training on several devices failed, is gone, or has other weights; the message names it."""


class SeamError(YOLOv12Error, ImportError):
    """The installed Ultralytics has no such function or class; the message names the seam."""
