"""What a client sees of a growing answer: text increments, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from quire.core.request import TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.text.incremental import incremental_decoder
from quire.text.stop_strings import StopStrings
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push adds.

    `text` may lag behind `token_ids`: half a character, or what may become a stop string, is held back. `stop` is the
    stop string that was found; `token_ids` (and `logprobs`) then end with the token that completed it.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    stop: str | None = None
    logprobs: list[TokenLogprobs] | None = None


class TextStream:
    """Turns the token ids of one answer into text.

    The increments put together are `tokenizer.decode` of all ids, cut at the first stop string (or after it, with
    `include_stop_str_in_output`). Stop strings count from the token on with which `min_tokens` are reached. The text
    of a token that ends the answer by itself (`stop_token_ids`, and `eos_token_ids` unless EOS is ignored) is left out
    unless `include_stop_str_in_output`.

    `prompt_token_ids` give the first token its context (a leading space, the rest of a character).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        *,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._sampling = sampling
        self._decoder = incremental_decoder(
            tokenizer,
            prompt_token_ids,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        )
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_token_ids))
        self._silent_ends = frozenset[int]() if sampling.include_stop_str_in_output else ends
        self._stops = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        self._parts: list[str] = []
        self._num_tokens = 0
        self._ended = False

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> TextDelta:
        """Takes what a step of the engine added. After a stop string was found there is nothing more to say."""
        parts: list[str] = []
        taken: list[int] = []
        stop = None
        for token_id in token_ids:
            if self._ended:
                break
            taken.append(token_id)
            text, stop = self._push_one(token_id)
            parts.append(text)
        shown = self._show("".join(parts))
        return TextDelta(shown, taken, stop, None if logprobs is None else list(logprobs[: len(taken)]))

    def flush(self) -> TextDelta:
        """The end: returns what was held back. Half a character becomes U+FFFD."""
        if self._ended or not self._sampling.detokenize:
            return TextDelta("")
        self._ended = True
        text, stop = self._stops.feed(self._decoder.flush(), armed=self._armed())
        if stop is None:
            text += self._stops.flush()
        return TextDelta(self._show(text), stop=stop)

    def _push_one(self, token_id: int) -> tuple[str, str | None]:
        self._num_tokens += 1
        if not self._sampling.detokenize:
            return "", None
        armed = self._armed()
        if armed and token_id in self._silent_ends:
            return "", None
        text, stop = self._stops.feed(self._decoder.push(token_id), armed=armed)
        self._ended = stop is not None
        return text, stop

    def _armed(self) -> bool:
        return self._num_tokens >= self._sampling.min_tokens

    def _show(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
