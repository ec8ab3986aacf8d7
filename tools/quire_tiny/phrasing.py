"""How people ask: small variations of a phrasing that leave the thing asked about untouched."""

from random import Random

_OPENERS = ("Hi! ", "Hello, ", "Hey, ", "OK, ", "Now ", "Next: ", "Hi, ")


def _lower_first(text: str) -> str:
    return text if text[:2] in ("I ", "I'") else text[0].lower() + text[1:]


def phrase(rng: Random, commands: tuple[str, ...], questions: tuple[str, ...] = (), **slots: str) -> str:
    """One of the phrasings, varied, with `{name}` replaced by each slot's text.

    `commands` are imperative ("Add {a} and {b}."), so they also take "please" and "can you".
    """
    choice = rng.randrange(len(commands) + len(questions))
    imperative = choice < len(commands)
    text = commands[choice] if imperative else questions[choice - len(commands)]
    if imperative and text[0].isalpha():
        roll = rng.random()
        if roll < 0.12:
            text = "Please " + _lower_first(text)
        elif roll < 0.24:
            text = rng.choice(("Can you ", "Could you ", "Can you please ")) + _lower_first(text)
            if text.endswith("."):
                text = text[:-1] + "?"
        elif roll < 0.3 and text.endswith("."):
            text = text[:-1] + ", please."
    if text[0].isalpha() and rng.random() < 0.06:
        text = rng.choice(_OPENERS) + _lower_first(text)
    if rng.random() < 0.2:
        text = _lower_first(text)
    if text[-1] in ".?" and rng.random() < 0.2:
        text = text[:-1]
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    return text
