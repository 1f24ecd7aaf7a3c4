"""Tells other threads how far a step has come, layer by layer."""

import threading
from collections.abc import Callable

OnLayer = Callable[[int], None]
"""Is told how many of the rank's first layers have their keys and values written."""


class LayerProgress:
    """Counts the layers of a rank whose keys and values a step has written. One thread writes, others read or wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_layers = 0
        self._is_over = False
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """Tells whether the step has failed, so that what it has not written will never be."""
        return self._has_failed

    def advance(self, num_layers: int) -> None:
        """Notes that the keys and values of the rank's first ``num_layers`` layers are written."""
        with self._changed:
            self._num_layers = max(self._num_layers, num_layers)
            self._changed.notify_all()

    def finish(self) -> None:
        """Notes that the step is computed: those of all layers are written."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def fail(self) -> None:
        """Notes that the step has failed, unless it is computed."""
        with self._changed:
            self._has_failed = not self._is_over
            self._changed.notify_all()

    def is_written(self, layer: int) -> bool:
        """Tells whether the keys and values of a layer are written, by its place among the rank's own."""
        return self._is_over or self._num_layers > layer

    def wait(self, layer: int, timeout_s: float) -> bool:
        """Waits until those of a layer are written, or the step has failed, and returns :meth:`is_written`."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_written(layer) or self._has_failed, timeout_s)
            return self.is_written(layer)
