"""What can be done for an engine before torch is imported, which takes a second or two: read its packed weights."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from quire.config.engine import EngineConfig
from quire.models.packed_weights import GIB, CacheSettings, KeptWeights, open_kept


class EarlyWeights:
    """Reads on a thread of its own from when it is made."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._kept: KeptWeights | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="early-weights", daemon=True)
        self._thread.start()

    def result(self) -> KeptWeights | None:
        """Waits until it is read. Raises what `open_packed_weights` raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._kept

    def _read(self) -> None:
        try:
            self._kept = open_packed_weights(self._config)
        except Exception as error:  # raised where it is waited for
            self._error = error


def open_packed_weights(config: EngineConfig) -> KeptWeights | None:
    """This model's file in the cache, read if it is there; None without a cache or where it does not apply. Raises
    QuireError for what is wrong with the checkpoint or the settings."""
    if config.packed_weights_cache is None:
        return None
    return open_kept(
        CacheSettings(
            directory=Path(config.packed_weights_cache), max_bytes=int(config.packed_weights_cache_size * GIB)
        ),
        Path(config.model),
        dtype=config.dtype,
        quantization=config.quantization,
        threads=engine_threads(config),
        isa=config.isa,
    )


def engine_threads(config: EngineConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))
