"""Work of fixed shape that is done again and again: as CUDA graphs where there are any, otherwise by calling it.

What is captured reads and writes buffers that stay where they are; the host's part of a call is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    def has(self, key: Hashable) -> bool:
        """Whether `run` with this key does nothing but its work. Otherwise `capture` comes first."""
        ...

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Does `work`, to have kernels compiled and memory measured, then records it without doing it."""
        ...

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """What was captured under the key, or `work` itself."""
        ...


class Direct:
    """Calls it."""

    def has(self, key: Hashable) -> bool:  # noqa: ARG002
        return True

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:  # noqa: ARG002
        raise AssertionError("there is nothing to capture")

    def run(self, key: Hashable, work: Callable[[], None]) -> None:  # noqa: ARG002
        work()


class CudaGraphs:
    """One graph per key. All share one pool of memory, since only one runs at a time, and are captured on one stream:
    the allocator keeps what was free on a stream for that stream."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def has(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Once without recording: Triton compiles and loads what it has not yet, and libraries open their handles,
            # which is not allowed while a stream is captured.
            work()
            # Not by way of `torch.cuda.graph`, which empties the allocator's cache each time. Other threads may go on
            # using the GPU.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # what broke the capture is the news
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[key] = graph

    def run(self, key: Hashable, work: Callable[[], None]) -> None:  # noqa: ARG002
        self._graphs[key].replay()
