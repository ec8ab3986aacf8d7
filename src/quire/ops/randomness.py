"""Random numbers by counter: a function of (seed, position) and nothing else.

There is no state to keep, to copy, or to get out of step, so a request's random numbers are the same in any company,
after preemption, and when several positions are sampled at once.
"""

from __future__ import annotations

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. Any seed of 64 bits, signed or not; `position` counts tokens."""
    # The seed is mixed before the position comes in, so that neighbouring seeds do not share shifted sequences.
    key = _mix((seed + _STEP) & _MASK)
    return (_mix((key + (position + 1) * _STEP) & _MASK) >> 11) * 2.0**-53
