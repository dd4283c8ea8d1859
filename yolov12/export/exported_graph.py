"""One exported ONNX file, and the variants of its graph. The file holds one variant at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
from ultralytics.utils import LOGGER

from yolov12 import files
from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import graph
from yolov12.export.budget import MemoryLimit, smallest_and_largest, tensors_limit
from yolov12.export.rewrite import Split, Splitter

__all__ = ["ExportedGraph"]


class ExportedGraph:
    """The graph in an ONNX file that Ultralytics exported.

    The file is read and planned when this is needed for the first time. Variants of the graph are made in memory.
    `write` writes one of them to the file.

    Args:
        file: The ONNX file.
        shape: (images, channels, height, width) of the export.
        dynamic: Whether the graph has dynamic axes.
        half: Compute in FP16 instead of the file's FP32.
    """

    def __init__(self, file: Path, shape: Sequence[int], dynamic: bool = False, half: bool = False) -> None:
        self.file = file
        self._smallest, self._largest = smallest_and_largest(shape, dynamic)
        self._half = half
        self._in_file: ir.Model | None = None  # None: the graph that was exported
        self._exported = b""  # content of the exported file, read before it is replaced

    def split(self, limit: MemoryLimit) -> Split | None:
        """Split the graph, if it does not fit. The file is not changed.

        Args:
            limit: Memory for everything that a builder needs.

        Returns:
            The variant that fits; None if there is no limit, or the graph cannot be planned, which is logged.

        Raises:
            DoesNotFitError: The graph cannot be split to the limit.
        """
        if limit.total_bytes is None:
            return None
        try:
            return self._splitter.split(tensors_limit(self._splitter.whole, limit.total_bytes))
        except ConfigError as error:
            LOGGER.warning(f"yolov12: {error}. The graph is not split")
            return None
        except DoesNotFitError as error:
            raise DoesNotFitError(f"{error}. The limit of {limit.total_bytes >> 20} MiB is {limit.source}") from None

    def split_tighter(self, limit: MemoryLimit, fraction: float) -> Split | None:
        """Split the graph to a fraction of the memory for its tensors.

        Args:
            limit: The limit that `split` was given; its bytes are known.
            fraction: Fraction of the bytes for tensors, in (0, 1).

        Returns:
            The variant that fits; None if the graph cannot be split so far.
        """
        assert limit.total_bytes is not None
        try:
            return self._splitter.try_split(int(tensors_limit(self._splitter.whole, limit.total_bytes) * fraction))
        except ConfigError as error:
            LOGGER.warning(f"yolov12: {error}. The graph is not split further")
            return None

    def write(self, variant: Split | None = None) -> None:
        """Write a variant to the file, unless the file holds it already.

        Args:
            variant: The variant; None for the unsplit graph.
        """
        model = self._whole if self._half else None
        if variant is not None and variant.sites:
            model = variant.model
            LOGGER.info(
                f"yolov12: {len(variant.sites)} places of the graph are split, so that its tensors take "
                f"{variant.plan.peak_bytes >> 20} MiB instead of {variant.before.peak_bytes >> 20}"
            )
        if model is self._in_file:
            return
        if not self._half and not self._exported:
            self._exported = self.file.read_bytes()
        content = self._exported if model is None else ir.to_proto(model).SerializeToString()
        files.write(self.file, lambda file: file.write(content))
        self._in_file = model

    @cached_property
    def _whole(self) -> ir.Model:
        model = graph.load(self.file)
        return graph.to_half(model) if self._half else model

    @cached_property
    def _splitter(self) -> Splitter:
        shapes = (graph.input_shapes(self._whole, shape) for shape in (self._largest, self._smallest))
        return Splitter(self._whole, *shapes)
