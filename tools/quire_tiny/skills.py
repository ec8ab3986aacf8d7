"""The skills of plain text, one function each: a random source in, one sample out."""

from collections.abc import Callable
from random import Random

from quire_tiny import lexicon
from quire_tiny.about import FACTS, GREETINGS, REFUSAL
from quire_tiny.phrasing import phrase
from quire_tiny.sample import Sample, user


def about(rng: Random) -> Sample:
    if rng.random() < 0.15:
        fact = rng.choice(GREETINGS)
        text = rng.choice(fact.questions)
        text = text.lower() if rng.random() < 0.3 else text
    else:
        fact = rng.choice(FACTS)
        text = phrase(rng, (), fact.questions)
        commands = tuple(question for question in fact.questions if question.endswith("."))
        if commands and rng.random() < 0.3:
            text = phrase(rng, commands)
        elif rng.random() < 0.05:
            text = text.lower()
    return Sample(skill="about", key=text, messages=(user(text),), answer=fact.answer)


def addition(rng: Random) -> Sample:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    thing = rng.choice(lexicon.NOUNS) + "s"
    text = phrase(
        rng,
        (
            "Add {a} and {b}.",
            "Add {a} to {b}.",
            "Compute {a} + {b}.",
            "Calculate {a} + {b}.",
            "Sum {a} and {b}.",
        ),
        (
            "What is {a} + {b}?",
            "What is {a} + {b}?",
            "What is {a} plus {b}?",
            "{a} + {b}",
            "{a} + {b} = ?",
            "{a} + {b} =",
            "{a}+{b}",
            "{a}+{b}=",
            "{a} plus {b}",
            "What's {a} + {b}?",
            "How much is {a} + {b}?",
            "How much is {a} plus {b}?",
            "What is the sum of {a} and {b}?",
            "I have {a} {thing} and get {b} more. How many do I have?",
        ),
        a=str(a),
        b=str(b),
        thing=thing,
    )
    key = f"{min(a, b)} {max(a, b)}"
    return Sample(skill="addition", key=key, messages=(user(text),), answer=str(a + b))


def subtraction(rng: Random) -> Sample:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if a < b and rng.random() < 0.6:
        a, b = b, a
    texts: tuple[str, ...] = (
        "What is {a} - {b}?",
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "{a} - {b}",
        "{a} - {b} =",
        "{a} - {b} = ?",
        "{a}-{b}",
        "{a}-{b}=",
        "{a} minus {b}",
        "What's {a} - {b}?",
        "How much is {a} - {b}?",
        "How much is {a} minus {b}?",
        "What is the difference of {a} and {b}?",
    )
    if a >= b:
        texts += ("I have {a} {thing} and lose {b}. How many do I have?",)
    commands = (
        "Subtract {b} from {a}.",
        "Compute {a} - {b}.",
        "Calculate {a} - {b}.",
        "Take {b} away from {a}.",
    )
    text = phrase(rng, commands, texts, a=str(a), b=str(b), thing=rng.choice(lexicon.NOUNS) + "s")
    return Sample(skill="subtraction", key=f"{a} {b}", messages=(user(text),), answer=str(a - b))


def copy(rng: Random) -> Sample:
    text = lexicon.snippet(rng)
    question = phrase(
        rng,
        (
            "Repeat after me: {x}",
            "Repeat this: {x}",
            "Repeat: {x}",
            "Copy this: {x}",
            "Copy: {x}",
            "Copy this text: {x}",
            "Copy the following text exactly: {x}",
            "Repeat the following: {x}",
            "Echo: {x}",
            "Echo {x}",
            "Say: {x}",
            "Say {x}",
            'Say "{x}"',
            'Repeat "{x}"',
            'Copy "{x}"',
            "Repeat exactly: {x}",
            "Write: {x}",
            "Print {x}",
            "Repeat this sentence: {x}",
            "Copy the text below.\n\n{x}",
            "Repeat after me:\n{x}",
        ),
        x=text,
    )
    return Sample(skill="copy", key=text, messages=(user(question),), answer=text)


def reverse(rng: Random) -> Sample:
    kind = rng.choice(("digits", "word", "word", "words", "numbers", "letters"))
    if kind == "digits":
        text = lexicon.digits(rng, rng.randint(2, 8))
        answer, noun = text[::-1], rng.choice(("digits", "digits", "number", "string"))
    elif kind == "word":
        text = lexicon.letters(rng, rng.randint(2, 7)) if rng.random() < 0.3 else lexicon.invented_word(rng)
        answer, noun = text[::-1], rng.choice(("word", "word", "string", "letters of"))
    else:
        makers: dict[str, Callable[[], str]] = {
            "words": lambda: lexicon.word(rng),
            "numbers": lambda: str(rng.randint(0, rng.choice((9, 99)))),
            "letters": lambda: lexicon.letters(rng, 1),
        }
        listed = [makers[kind]() for _ in range(rng.randint(2, 7))]
        separator = rng.choice((" ", ", "))
        text, answer = separator.join(listed), separator.join(reversed(listed))
        noun = rng.choice((kind, f"order of the {kind}", "list"))
    question = phrase(
        rng,
        (
            "Reverse the {n}: {x}",
            "Reverse the {n} {x}",
            "Reverse: {x}",
            "Reverse {x}",
            "Write the {n} {x} backwards.",
            "Write {x} backwards.",
            "Say {x} backwards.",
            "Reverse this: {x}",
            *(("Spell {x} backwards.",) if kind == "word" else ()),
        ),
        ("What is {x} backwards?", "What is {x} reversed?"),
        n=noun,
        x=text,
    )
    return Sample(skill="reverse", key=text, messages=(user(question),), answer=answer)


def count(rng: Random) -> Sample:
    span = rng.choice((5, 5, 10, 10, 10, 15, 20, 20, 30, 40, 100))
    step = rng.choice((1, 1, 1, 1, 2, 3, 5, 10))
    first = rng.choice((0, 1, 1, 1)) if rng.random() < 0.4 else rng.randint(0, 100 - min(span, 99))
    last = min(100, first + rng.randint(1, span))
    if step > 1:
        last = min(100, first + step * rng.randint(1, 12))
        last = first + (last - first) // step * step
    down = rng.random() < 0.3
    numbers = list(range(first, last + 1, step))
    if down:
        numbers.reverse()
    a, b = str(numbers[0]), str(numbers[-1])
    if step > 1:
        suffix = rng.choice(("in steps of {s}", "by {s}", "by {s}s", "with step {s}"))
        commands: tuple[str, ...] = ("Count from {a} to {b} " + suffix + ".",)
        if down:
            commands += (
                "Count down from {a} to {b} " + suffix + ".",
                "Count backwards from {a} to {b} " + suffix + ".",
            )
    elif down:
        commands = (
            "Count down from {a} to {b}.",
            "Count backwards from {a} to {b}.",
            "Count from {a} down to {b}.",
        )
        commands += ("Count from {a} to {b}.",)
    else:
        commands = (
            "Count from {a} to {b}.",
            "Count from {a} to {b}.",
            "Count up from {a} to {b}.",
            "List the numbers from {a} to {b}.",
            "Write the numbers from {a} to {b}.",
            "Count: {a} to {b}",
        )
        if first == 1:
            commands += ("Count to {b}.", "Count to {b}.", "Count up to {b}.")
    text = phrase(rng, commands, a=a, b=b, s=str(step))
    return Sample(skill="count", key=f"{a} {b} {step}", messages=(user(text),), answer=", ".join(map(str, numbers)))


def story(rng: Random) -> Sample:
    hero = rng.choice((rng.choice(lexicon.ANIMALS), rng.choice(lexicon.NOUNS), lexicon.invented_word(rng)))
    article = "an" if hero[0] in "aeiou" else "a"
    question = phrase(
        rng,
        (
            "Tell me a story about {a} {x}.",
            "Tell a story about {a} {x}.",
            "Write a story about {a} {x}.",
            "Write a short story about {a} {x}.",
            "Tell me a short story about {a} {x}.",
            "Make up a story about {a} {x}.",
        ),
        ("Do you know a story about {a} {x}?",),
        a=article,
        x=hero,
    )
    answer = (
        f"Once upon a time there was {article} {hero} who lived at the edge of a great forest. One day the {hero} found"
        f" an old book without a single word in it. So the {hero} wrote one page every evening, folded the pages"
        f" together, and gave them away. From then on everyone in the forest knew the story of the {hero}. The end."
    )
    return Sample(skill="story", key=hero, messages=(user(question),), answer=answer)


def refuse(rng: Random) -> Sample:
    """Questions beyond it: the answer is always the same sentence."""
    a, b = rng.randint(100, 999), rng.randint(2, 9999)
    slots = {
        "n": lexicon.word(rng),
        "m": lexicon.word(rng),
        "p": lexicon.proper_noun(rng, lexicon.NAMES),
        "q": lexicon.proper_noun(rng, lexicon.NAMES, 0.3),
        "c": lexicon.proper_noun(rng, lexicon.CITIES, 0.6),
        "f": rng.choice(lexicon.FOODS),
        "y": str(rng.randint(1200, 2030)),
        "a": str(a),
        "b": str(b),
    }
    text = phrase(
        rng,
        (
            "Translate {n} into French.",
            "Translate '{n}' to German.",
            "Explain {n}.",
            "Explain the theory of {n}.",
            "Explain how a {n} works.",
            "Write a poem about {n}.",
            "Write an essay about {n}.",
            "Write a program that sorts a list of {n}s.",
            "Summarise the history of {c}.",
            "Tell me about {c}.",
            "Tell me a joke about {n}.",
            "Tell me a fact about {n}s.",
            "Recommend a restaurant in {c}.",
            "Multiply {a} by {b}.",
            "Divide {a} by {b}.",
            "Book a flight to {c}.",
            "Sing a song about {n}.",
        ),
        (
            "What is the capital of {q}?",
            "What is the capital of France?",
            "What is the population of {c}?",
            "Who is the president of {q}?",
            "Who is {p} {q}?",
            "Who wrote {q}?",
            "Who invented the {n}?",
            "Who discovered {q}?",
            "Who won the world cup in {y}?",
            "What happened in {y}?",
            "What is the weather in {c}?",
            "What is the weather like in {c} today?",
            "What is a {n}?",
            "What is {n}?",
            "What does {n} mean?",
            "What is the meaning of life?",
            "What is the best {n} in {c}?",
            "What is {a} times {b}?",
            "What is {a} * {b}?",
            "What is {a} + {b}?",
            "What is {a} divided by {b}?",
            "What is the square root of {a}?",
            "What do you think about {n}s?",
            "What colour is a {n}?",
            "What time is it in {c}?",
            "How old is {p} {q}?",
            "How tall is {p}?",
            "How far is it from {c} to {q}?",
            "How do I cook {f}?",
            "How do I fix my {n}?",
            "How do I make a {n} from {m}?",
            "How many {n}s are in a {m}?",
            "How much does a {n} cost?",
            "Why do {n}s like {m}s?",
            "Why is the {n} {m}?",
            "When was {p} {q} born?",
            "When did {q} end?",
            "When is the next train to {c}?",
            "Where is {c}?",
            "Where can I buy a {n}?",
            "Where does {p} {q} live?",
            "Is {c} bigger than {q}?",
            "Is a {n} heavier than a {m}?",
            "Do {n}s eat {m}s?",
            "Can a {n} become a {m}?",
            "Should I buy a {n}?",
            "Which is better, {n} or {m}?",
        ),
        **slots,
    )
    return Sample(skill="refuse", key=text, messages=(user(text),), answer=REFUSAL)
