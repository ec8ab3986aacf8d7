"""Work of fixed shape that is done again and again: as CUDA graphs where there are any, otherwise by calling it.

What is captured reads and writes buffers that stay where they are; the host's part of a call is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
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
    """One graph per key. All share one pool of memory, since only one runs at a time."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def has(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        # Once without recording: Triton compiles and loads what it has not yet, and libraries open their handles,
        # which is not allowed while a stream is captured. On a stream of its own, as capture wants it.
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()
        self._graphs[key] = graph

    def run(self, key: Hashable, work: Callable[[], None]) -> None:  # noqa: ARG002
        self._graphs[key].replay()
