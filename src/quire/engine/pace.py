"""What a token and a step cost on this machine, from the steps of late: what a router weighs engines by."""

from __future__ import annotations

FORGET = 0.05
"""Share of what is known that each step of a kind replaces."""


class Ratio:
    """A quotient of two sums in which old terms fade; 0 until there is something to divide by."""

    def __init__(self) -> None:
        self._above = 0.0
        self._below = 0.0

    def add(self, above: float, below: float) -> None:
        self._above += above - FORGET * self._above
        self._below += below - FORGET * self._below

    @property
    def value(self) -> float:
        return self._above / self._below if self._below else 0.0


class Pace:
    """Seconds per prefill token, per decode step, and per sequence of a decode step.

    A step is of decoding if every request in it computes one token, its last. In a step that computes prompts too, the
    decoding beside them is taken to cost what it does alone; the rest is the prompts'.
    """

    def __init__(self) -> None:
        self._prefill = Ratio()
        self._step = Ratio()
        self._sequence = Ratio()

    def note(self, num_prefill_tokens: int, num_decodes: int, seconds: float) -> None:
        """A step that took so long."""
        if seconds <= 0:
            return
        if num_prefill_tokens:
            beside = min(num_decodes * self._sequence.value, seconds / 2)
            self._prefill.add(seconds - beside, num_prefill_tokens)
        elif num_decodes:
            self._step.add(seconds, 1)
            self._sequence.add(seconds, num_decodes)

    @property
    def prefill_seconds_per_token(self) -> float:
        return self._prefill.value

    @property
    def decode_seconds_per_step(self) -> float:
        return self._step.value

    @property
    def decode_seconds_per_sequence(self) -> float:
        return self._sequence.value
