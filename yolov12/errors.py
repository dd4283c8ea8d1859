"""The errors that this package raises on purpose. Every message says what happened and what to do.

Each is also an error of the type that Ultralytics or PyTorch raises in its place, so code that catches that type works.

YOLOv12Error
├── ConfigError                 an argument is not valid (also a ValueError)
│   ├── ArgumentTypeError       an argument has a type that it cannot have (also a TypeError)
│   ├── NothingToResumeError    a training is complete (also an AssertionError)
│   └── FolderInUseError        another training runs in the folder of the run
├── DataError                   a data set cannot be used (also a RuntimeError and a ValueError)
│   ├── MissingImagesError      a data set has no images (also a FileNotFoundError)
│   └── UntrustedDataError      a data set would run code to download itself
├── WeightsError                a weight file cannot be used
│   ├── MissingWeightsError     a weight file does not exist (also a FileNotFoundError)
│   └── UnreadableWeightsError  a weight file is not a checkpoint (also a TypeError)
│       └── UntrustedWeightsError   a weight file asks for code outside the allow-list
├── ExportError                 a builder refuses an exported graph
├── DoesNotFitError             one image does not fit into memory (also a MemoryError)
├── RankError                   another rank of a distributed training failed or is gone (also a RuntimeError)
└── SeamError                   the installed Ultralytics lacks a name that we patch (also an ImportError)
"""

import re

from yolov12.printable import printable_lines

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def plain(message: object) -> str:
    """Return the text of a message or error without ANSI colour codes, which messages of Ultralytics may contain.

    Other control characters are written as escapes.
    """
    return printable_lines(_ANSI.sub("", str(message)))


class YOLOv12Error(Exception):
    """Base class of the errors that this package raises on purpose."""


class ConfigError(YOLOv12Error, ValueError):
    """An argument is unknown or malformed, or this machine does not support it."""


class ArgumentTypeError(ConfigError, TypeError):
    """An argument has a type that it cannot have."""


class NothingToResumeError(ConfigError, AssertionError):
    """A training that shall go on is complete, or a checkpoint is of no training."""


class FolderInUseError(ConfigError):
    """Another training runs in the folder of the run. When it ends, another attempt succeeds."""


class DataError(YOLOv12Error, RuntimeError, ValueError):
    """A data set is missing, empty, or malformed."""


class MissingImagesError(DataError, FileNotFoundError):
    """A data set names images that do not exist."""


class UntrustedDataError(DataError):
    """A data set yaml has code that downloads the data set. The message shows it."""


class WeightsError(YOLOv12Error):
    """A weight file is missing, unreadable, or not a checkpoint."""


class MissingWeightsError(WeightsError, FileNotFoundError):
    """A weight file does not exist, and cannot be downloaded."""


class UnreadableWeightsError(WeightsError, TypeError):
    """A weight file is incomplete, or not a checkpoint."""


class UntrustedWeightsError(UnreadableWeightsError):
    """A weight file names code outside the allow-list. Loading the file would run that code."""


class ExportError(YOLOv12Error):
    """A builder refuses an exported graph for a reason other than memory."""


class DoesNotFitError(YOLOv12Error, MemoryError):  # as a RuntimeError, Ultralytics' loop would halve the batch
    """One image does not fit into memory. The message gives the bytes needed, the bytes free, and ways out."""


class RankError(YOLOv12Error, RuntimeError):
    """Another rank failed, is gone, or has different weights. The message names the rank."""


class SeamError(YOLOv12Error, ImportError):
    """The installed Ultralytics lacks a function or class that we patch. The message names it."""
