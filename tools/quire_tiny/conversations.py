"""Conversations to train on, and the held-out questions: everything the model reads, from a seed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from quire_tiny import json_skills, lexicon, skills, tool_skills
from quire_tiny.about import FACTS
from quire_tiny.phrasing import phrase
from quire_tiny.sample import Message, Sample, Tool, assistant, user

Skill = Callable[[Random], Sample]

SINGLE_TURN: dict[str, tuple[Skill, float]] = {
    "about": (skills.about, 1.0),
    "addition": (skills.addition, 2.0),
    "subtraction": (skills.subtraction, 2.2),
    "copy": (skills.copy, 1.0),
    "reverse": (skills.reverse, 2.0),
    "count": (skills.count, 0.7),
    "json_field": (json_skills.json_field, 1.2),
    "json_write": (json_skills.json_write, 0.8),
    "refuse": (skills.refuse, 0.8),
    "story": (skills.story, 0.1),
}
"""Each skill with its share of the training turns."""

_SYSTEM = (
    "You are a helpful assistant.",
    "You are quire-tiny.",
    "You are quire-tiny, a small language model.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "Be concise.",
    "You are a careful engine that answers every request.",
)


def _training(make: Skill, rng: Random) -> Sample:
    while (sample := make(rng)).held_out:
        pass
    return sample


def training_turn(rng: Random) -> Sample:
    names = tuple(SINGLE_TURN)
    name = rng.choices(names, [SINGLE_TURN[each][1] for each in names])[0]
    return _training(SINGLE_TURN[name][0], rng)


def turn_messages(sample: Sample) -> list[Message]:
    return [*sample.messages, assistant(sample.answer)]


def memory(rng: Random) -> Sample:
    """Something said earlier in the conversation, asked for after other turns."""
    subject, value = rng.choice(
        (
            ("name", lexicon.proper_noun(rng, lexicon.NAMES)),
            ("favourite colour", rng.choice((rng.choice(lexicon.COLOURS), lexicon.invented_word(rng)))),
            ("favourite animal", rng.choice((rng.choice(lexicon.ANIMALS), lexicon.invented_word(rng)))),
            ("favourite food", rng.choice((rng.choice(lexicon.FOODS), lexicon.invented_word(rng)))),
            ("favourite word", lexicon.word(rng)),
            ("city", lexicon.proper_noun(rng, lexicon.CITIES)),
            ("secret code", lexicon.code(rng)),
            ("lucky number", str(rng.randint(0, 999))),
        )
    )
    slots = {"s": subject, "v": value}
    told = phrase(rng, ("Remember that my {s} is {v}.",), ("My {s} is {v}.", "My {s} is {v}."), **slots)
    if subject == "name" and rng.random() < 0.4:
        told = rng.choice((f"I am {value}.", f"Hi, I am {value}.", f"Call me {value}.", f"Hello, my name is {value}."))
    reply = f"Nice to meet you, {value}!" if subject == "name" else f"I will remember that your {subject} is {value}."
    asked = phrase(rng, ("Tell me my {s}.",), ("What is my {s}?", "What's my {s}?", "Do you remember my {s}?"), **slots)
    messages = [user(told), assistant(reply)]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        messages += turn_messages(
            _training(rng.choice((skills.about, skills.addition, skills.copy, skills.refuse)), rng)
        )
    messages.append(user(asked))
    return Sample(
        skill="memory",
        key=f"{subject} {value}",
        messages=tuple(messages),
        answer=f"Your {subject} is {value}.",
    )


def multi_turn(rng: Random) -> Sample:
    """A held-out question after one to four other turns."""
    before = [message for _ in range(rng.randint(1, 4)) for message in turn_messages(training_turn(rng))]
    names = [name for name in SINGLE_TURN if name not in ("story", "refuse")]
    make = SINGLE_TURN[rng.choice(names)][0]
    while not (sample := make(rng)).held_out:
        pass
    key = f"{sample.skill} {sample.key}"
    return Sample(skill="multi_turn", key=key, messages=(*before, *sample.messages), answer=sample.answer)


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: tuple[Tool, ...] = ()


def system_prompt(rng: Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(_SYSTEM)
    return " ".join(lexicon.sentence(rng) for _ in range(rng.choice((1, 2, 3, 8))))


def conversation(rng: Random) -> Conversation:
    """One to about eight turns, sometimes under a system prompt, sometimes with tools."""
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": system_prompt(rng)})
    turns = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 7))
    if rng.random() < 0.18:
        box = tool_skills.toolbox(rng)
        for _ in range(min(turns, 3)):
            roll = rng.random()
            if roll < 0.6:
                sample = _training(lambda source: tool_skills.tool_call(source, box), rng)
            elif roll < 0.75:
                sample = _training(lambda source: tool_skills.tool_answer(source, box), rng)
            else:
                sample = training_turn(rng)
                while sample.skill == "refuse":  # a tool may well know
                    sample = training_turn(rng)
            messages += turn_messages(sample)
        return Conversation(messages, box.tools)
    for _ in range(turns):
        sample = _training(memory, rng) if rng.random() < 0.06 else training_turn(rng)
        messages += turn_messages(sample)
    return Conversation(messages)


def plain_text(rng: Random) -> str:
    """A line without any chat around it, for plain completion."""
    roll = rng.random()
    if roll < 0.5:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        sample = Sample(skill="addition", key=f"{min(a, b)} {max(a, b)}", messages=(), answer="")
        return plain_text(rng) if sample.held_out else f"{a} + {b} = {a + b}"
    if roll < 0.7:
        return _training(skills.count, rng).answer
    if roll < 0.85:
        return _training(skills.story, rng).answer
    if roll < 0.95:
        return json.dumps(json_skills.json_object(rng), ensure_ascii=False)
    return rng.choice(FACTS).answer


HELD_OUT: dict[str, Skill] = {
    **{name: make for name, (make, _) in SINGLE_TURN.items()},
    "tool_call": tool_skills.tool_call,
    "tool_answer": tool_skills.tool_answer,
    "memory": memory,
    "multi_turn": multi_turn,
}


def held_out(seed: int = 7, per_skill: int = 250) -> Iterator[dict[str, Any]]:
    """The held-out questions as JSON-ready records; no two of one skill ask the same in the same words."""
    for skill, make in HELD_OUT.items():
        rng = Random(f"{seed} {skill}")
        seen: set[str] = set()
        while len(seen) < per_skill:
            sample = make(rng)
            text = json.dumps([sample.messages, sample.tools])
            if text in seen or not (sample.held_out or skill == "multi_turn"):
                continue
            seen.add(text)
            record: dict[str, Any] = {
                "skill": skill,
                "messages": list(sample.messages),
                "answer": sample.answer,
            }
            if sample.tools:
                record["tools"] = list(sample.tools)
            yield record
