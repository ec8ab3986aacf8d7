"""The sampling flags of `quire chat` and `quire complete`, sent to a server or to an engine of our own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from cyclopts import Parameter

from quire.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What is left None is the model's own default."""

    max_tokens: int | None = None
    """Most tokens to generate."""
    temperature: float | None = None
    """0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this mass."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens."""
    min_p: float | None = None
    """Keep tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """Above 1 discourages repeats."""
    seed: int | None = None
    """The same seed gives the same answer."""
    stop: list[str] | None = None
    """Text that ends the answer; may be repeated."""

    def given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """Raises `InvalidParameter` for a value out of its range."""
        return replace(defaults, **self.given())


GenerationFlags = Annotated[Generation | None, Parameter(name="*", group="Sampling")]
