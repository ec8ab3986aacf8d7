"""How much may be done twice: a share of what is done once, so that doing it again cannot become the load itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Budget:
    """A bucket that each request fills by `share` and each repetition empties by one."""

    share: float
    burst: int
    _left: float = field(init=False)

    def __post_init__(self) -> None:
        self._left = float(self.burst)

    def earn(self) -> None:
        """Called for each request."""
        self._left = min(self._left + self.share, float(self.burst))

    @property
    def allows(self) -> bool:
        """Whether there is enough left to do something again."""
        return self._left >= 1.0

    def spend(self) -> None:
        """Something is done again; after `allows`."""
        assert self.allows
        self._left -= 1.0
