"""Steps of a stream side by side: one thread a step, bounded queues between them.

A step is an ordinary iterator over the step before it, so order, results and errors are those of
the plain loop: an exception in a step reaches whoever consumes it, at the item where it happened.
The threads only overlap where their work releases the GIL (reading, encoding, packing, writing).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 1.0

T = TypeVar("T")


class _End:
    """Follows the last item; with the error that ended a step, if one did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Pipeline:
    """Context manager; leaving it stops its threads, whatever they are at.

    `depth` is how many finished items may wait between two steps.
    """

    def __init__(self, *, depth: int) -> None:
        self._depth = depth
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            # One that waits for standard input is left behind: it dies with the process.
            thread.join(_PATIENCE_SECONDS)

    def ahead(self, items: Iterable[T], *, name: str) -> Iterator[T]:
        """The same items, made by a thread of their own that runs ahead of the consumer."""
        made: queue.Queue[Any] = queue.Queue(self._depth)
        thread = threading.Thread(
            target=self._make, args=(items, made), name=f"miniplm {name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return self._consume(made)

    def _make(self, items: Iterable[T], made: queue.Queue[Any]) -> None:
        try:
            for item in items:
                if not self._put(made, item):
                    return
        except BaseException as error:  # noqa: BLE001  of any kind: the consumer raises it
            self._put(made, _End(error))
        else:
            self._put(made, _End())

    def _put(self, made: queue.Queue[Any], item: object) -> bool:
        """Wait for room; False if the pipeline was stopped meanwhile."""
        while not self._stopped.is_set():
            try:
                made.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def _consume(self, made: queue.Queue[Any]) -> Iterator[T]:
        while not self._stopped.is_set():
            try:
                item = made.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
