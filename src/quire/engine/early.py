"""What can be done for an engine before torch is imported, which takes a second or two: have its weights packed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from quire.config.engine import EngineConfig
from quire.core.machine import has_gpu_driver
from quire.models.packed_weights import GIB, CacheSettings, EarlyPacked, pack_early
from quire.models.serving import read_serving
from quire.ops.cpu.library import kernels_module


class EarlyWeights:
    """Works on a thread of its own from when it is made."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._packed: EarlyPacked | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._pack, name="early-weights", daemon=True)
        self._thread.start()

    def result(self) -> EarlyPacked | None:
        """Waits until all is done. Raises what `packed_early` raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._packed

    def _pack(self) -> None:
        device = self._config.device
        if device not in ("auto", "cpu") or (device == "auto" and has_gpu_driver()):
            return
        try:
            self._packed = packed_early(self._config)
        except Exception as error:  # raised where it is waited for
            self._error = error


def packed_early(config: EngineConfig) -> EarlyPacked | None:
    """As `pack_early`, of a configuration whose model is a local directory."""
    cache = None
    if config.packed_weights_cache is not None:
        max_bytes = int(config.packed_weights_cache_size * GIB)
        cache = CacheSettings(directory=Path(config.packed_weights_cache), max_bytes=max_bytes)
    return pack_early(
        cache,
        Path(config.model),
        dtype=config.dtype,
        quantization=config.quantization,
        threads=engine_threads(config),
        isa=config.isa,
        serving=read_serving(config),
        model_impl=config.model_impl,
    )


def engine_threads(config: EngineConfig) -> int:
    """One per core that the process may use, by affinity and by the cgroup's quota, if none are asked for."""
    if config.threads is not None:
        return config.threads
    module = kernels_module()
    return len(os.sched_getaffinity(0)) if module is None else int(module.default_threads())
