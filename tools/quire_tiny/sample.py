"""One exchange that has one right answer, and which side of the train / held-out split it is on."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`answer` is the assistant's whole next message; `key` names the content, whatever the phrasing."""

    skill: str
    key: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Tool, ...] = field(default=())

    @property
    def held_out(self) -> bool:
        """Whether this content may only be asked in the held-out set, never in training."""
        digest = hashlib.sha256(f"{self.skill}\n{self.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
