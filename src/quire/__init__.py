"""quire: an LLM inference engine and serving platform. `LLM` and `SamplingParams` are the Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from quire.core.sampling import SamplingParams
    from quire.engine.llm import LLM


def __getattr__(name: str) -> object:
    # Lazily, so that `quire --version` and the API server's process do not pay for torch.
    if name == "LLM":
        from quire.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from quire.core.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'quire' has no attribute {name!r}")
