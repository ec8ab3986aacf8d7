"""Finding stop strings in text that arrives in pieces.

Each stop string has a matcher of Knuth, Morris and Pratt: its state is the length of the longest end of the text that
could be the beginning of the stop string, which is just the text that must be held back. Work is linear in the text.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Matcher:
    """Follows one stop string through the text; `state` characters at the end of the text are its beginning."""

    __slots__ = ("_failure", "state", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._failure = _failure_table(text)

    def feed(self, character: str) -> bool:
        """Takes one more character; True if the stop string ends with it."""
        while self.state and self.text[self.state] != character:
            self.state = self._failure[self.state - 1]
        if self.text[self.state] == character:
            self.state += 1
        if self.state < len(self.text):
            return False
        self.state = self._failure[-1]
        return True


def _failure_table(text: str) -> list[int]:
    """For each beginning of the text, how long its longest proper beginning is that is also its end."""
    table = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = table[length - 1]
        if text[i] == text[length]:
            length += 1
        table[i] = length
    return table


class StopStrings:
    """Holds text back while it may be the beginning of a stop string.

    The stop string that counts is the one that is complete first; of those complete at the same character, the
    longest. What is found does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Takes more text; returns what may be shown by now, and the stop string if one is complete.

        While not `armed`, complete stop strings do not count. After one was found, no more text may be fed.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text, None
        whole = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            complete = [matcher.text for matcher in self._matchers if matcher.feed(character)]
            if complete and armed:
                stop = max(complete, key=len)
                self._held = ""
                return whole[: position if self._include else position - len(stop)], stop
        hold = max(matcher.state for matcher in self._matchers)
        self._held = whole[len(whole) - hold :]
        return whole[: len(whole) - hold], None

    def flush(self) -> str:
        """The text held back, at the end."""
        text, self._held = self._held, ""
        return text
