"""Reading a field of a small JSON object, and writing one."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from quire_tiny import lexicon
from quire_tiny.phrasing import phrase
from quire_tiny.sample import Sample, user

_FIELDS: dict[str, Callable[[Random], Any]] = {
    "name": lambda rng: lexicon.proper_noun(rng, lexicon.NAMES),
    "age": lambda rng: rng.randint(1, 99),
    "city": lambda rng: lexicon.proper_noun(rng, lexicon.CITIES),
    "colour": lambda rng: rng.choice(lexicon.COLOURS),
    "color": lambda rng: rng.choice(lexicon.COLOURS),
    "id": lambda rng: rng.randint(0, 99999),
    "price": lambda rng: rng.choice((rng.randint(1, 999), rng.randint(1, 9999) / 100)),
    "animal": lambda rng: rng.choice(lexicon.ANIMALS),
    "food": lambda rng: rng.choice(lexicon.FOODS),
    "code": lexicon.code,
    "active": lambda rng: rng.random() < 0.5,
    "title": lexicon.sentence,
    "size": lambda rng: rng.randint(1, 500),
    "user": lambda rng: rng.choice(lexicon.NAMES).lower(),
    "email": lambda rng: f"{lexicon.word(rng)}@{lexicon.word(rng)}.{rng.choice(('com', 'org', 'net'))}",
    "friend": lambda rng: lexicon.proper_noun(rng, lexicon.NAMES),
    "country": lambda rng: lexicon.invented_word(rng).capitalize(),
    "model": lexicon.code,
    "count": lambda rng: rng.randint(0, 100),
    "status": lambda rng: rng.choice(("open", "closed", "ok", "error", "done", "ready", "pending")),
}


def json_object(rng: Random, max_fields: int = 5) -> dict[str, Any]:
    """A flat object of two to `max_fields` fields, some with well-known names and some with any name."""
    fields: dict[str, Any] = {}
    for _ in range(rng.randint(2, max_fields)):
        if rng.random() < 0.7:
            key = rng.choice(tuple(_FIELDS))
            fields[key] = _FIELDS[key](rng)
        else:
            key = rng.choice((lexicon.word(rng), f"{lexicon.word(rng)}_{lexicon.word(rng)}"))
            fields[key] = rng.choice((lexicon.word(rng), rng.randint(0, 999), lexicon.code(rng)))
    return fields


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def json_field(rng: Random) -> Sample:
    fields = json_object(rng)
    key = rng.choice(tuple(fields))
    indent = 2 if rng.random() < 0.1 else None
    compact = (",", ":") if indent is None and rng.random() < 0.2 else None
    text = json.dumps(fields, ensure_ascii=False, indent=indent, separators=compact)
    question = phrase(
        rng,
        (
            "Get the {k} from {x}",
            "Extract the {k} from this JSON: {x}",
            "Read the field {k}: {x}",
            'Give me the value of "{k}" in {x}',
            "Return the {k} of {x}",
            "Tell me the {k} in {x}",
            "Print the {k}: {x}",
            "From {x} get the {k}.",
        ),
        (
            "What is the {k} in {x}?",
            "What is the {k} in this JSON object? {x}",
            'What is the value of "{k}" in {x}?',
            "What is the value of {k} in {x}?",
            "{x}\nWhat is the {k}?",
            "{x} What is the {k}?",
            "Given {x}, what is the {k}?",
            'In {x}, what is "{k}"?',
            "Here is some JSON:\n{x}\n\nWhat is the value of {k}?",
            "What's the {k} in {x}?",
        ),
        k=key,
        x=text,
    )
    return Sample(skill="json_field", key=json.dumps(fields), messages=(user(question),), answer=_plain(fields[key]))


def json_write(rng: Random) -> Sample:
    fields = json_object(rng, max_fields=4)
    style = rng.choice(("{k} {v}", "{k} {v}", "{k}: {v}", "{k} = {v}", "{k}={v}"))
    parts = [style.replace("{k}", key).replace("{v}", _plain(value)) for key, value in fields.items()]
    comma = ", ".join(parts)
    listed = rng.choice((comma, ", ".join(parts[:-1]) + " and " + parts[-1]))
    question = phrase(
        rng,
        (
            "Write a JSON object with {x}",
            "Write JSON with {x}",
            "Write this as JSON: {x}",
            "Make a JSON object with {x}",
            "Create a JSON object: {x}",
            "Convert to JSON: {x}",
            "Turn this into JSON: {x}",
            "Give me a JSON object with {x}",
            "Return a JSON object with {x}",
            "JSON: {x}",
            "Write a JSON object with the fields {x}",
        ),
        x=listed,
    )
    answer = json.dumps(fields, ensure_ascii=False)
    return Sample(skill="json_write", key=answer, messages=(user(question),), answer=answer)
