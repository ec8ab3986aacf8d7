"""Calling a tool with one argument, and passing on what a tool said. Definitions are in OpenAI's format."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from quire_tiny import lexicon
from quire_tiny.phrasing import phrase
from quire_tiny.sample import Message, Sample, Tool, user


@dataclass(frozen=True)
class Kind:
    """What a family of tools is for: the names it goes by, its argument, and how people ask for it."""

    names: tuple[str, ...]
    description: str
    arguments: tuple[str, ...]
    type: str
    value: Callable[[Random], Any]
    commands: tuple[str, ...]
    questions: tuple[str, ...] = ()


def _city(rng: Random) -> str:
    return lexicon.proper_noun(rng, lexicon.CITIES, 0.6)


def _name(rng: Random) -> str:
    return lexicon.proper_noun(rng, lexicon.NAMES)


def _topic(rng: Random) -> str:
    return " ".join(lexicon.word(rng) for _ in range(rng.choice((1, 1, 2, 3))))


def _number(rng: Random) -> int:
    return rng.randint(1, 99999) if rng.random() < 0.3 else rng.randint(1, 99)


KINDS = (
    Kind(
        ("get_weather", "get_current_weather", "weather"),
        "Get the current weather for a city.",
        ("city", "location", "city", "place"),
        "string",
        _city,
        ("Tell me the weather in {x}.", "Get the weather for {x}.", "Check the weather in {x}."),
        (
            "What is the weather in {x}?",
            "What is the weather like in {x}?",
            "How is the weather in {x}?",
            "What's the weather in {x}?",
            "What is the weather in {x} today?",
            "Is it raining in {x}?",
        ),
    ),
    Kind(
        ("get_time", "get_current_time", "clock"),
        "Get the current time in a city.",
        ("city", "location", "timezone"),
        "string",
        _city,
        ("Tell me the time in {x}.",),
        ("What time is it in {x}?", "What is the time in {x}?", "What's the time in {x}?"),
    ),
    Kind(
        ("search", "web_search", "search_web"),
        "Search the web.",
        ("query", "q", "text"),
        "string",
        _topic,
        ("Search for {x}.", "Search the web for {x}.", "Look up {x} on the web.", "Find pages about {x}."),
    ),
    Kind(
        ("set_timer", "start_timer", "timer"),
        "Start a timer.",
        ("minutes", "duration"),
        "integer",
        lambda rng: rng.randint(1, 120),
        ("Set a timer for {x} minutes.", "Start a timer of {x} minutes.", "Set a {x} minute timer."),
    ),
    Kind(
        ("get_order", "find_order", "order_status"),
        "Look up an order.",
        ("order_id", "id", "number"),
        "integer",
        _number,
        ("Look up order {x}.", "Find order {x}.", "Check order {x}."),
        ("Where is order {x}?", "What is the status of order {x}?"),
    ),
    Kind(
        ("get_stock_price", "stock_price", "get_price"),
        "Get the price of a stock.",
        ("symbol", "ticker"),
        "string",
        lambda rng: lexicon.letters(rng, rng.randint(2, 4)).upper(),
        ("Get the price of {x}.", "Check the stock price of {x}."),
        ("What is the price of {x}?", "What is the stock price of {x}?", "How much is {x} stock?"),
    ),
    Kind(
        ("call_contact", "phone", "call_person"),
        "Call a person.",
        ("name", "person", "contact"),
        "string",
        _name,
        ("Call {x}.", "Phone {x}.", "Give {x} a call."),
    ),
    Kind(
        ("play_music", "play_song", "play"),
        "Play a song.",
        ("title", "song", "name"),
        "string",
        _topic,
        ("Play {x}.", "Play the song {x}.", "Play some {x}."),
    ),
    Kind(
        ("read_file", "open_file"),
        "Read a file.",
        ("path", "file", "filename"),
        "string",
        lambda rng: f"{lexicon.word(rng)}.{rng.choice(('txt', 'py', 'md', 'json', 'csv'))}",
        ("Read the file {x}.", "Open {x}.", "Show me the file {x}.", "Read {x}."),
        ("What is in the file {x}?",),
    ),
    Kind(
        ("translate", "translate_word"),
        "Translate a text.",
        ("text", "word"),
        "string",
        lexicon.word,
        ("Translate {x}.", "Translate the word {x}.", "Translate '{x}'."),
    ),
    Kind(
        ("set_temperature", "thermostat"),
        "Set the temperature of the room.",
        ("degrees", "temperature"),
        "integer",
        lambda rng: rng.randint(5, 35),
        ("Set the temperature to {x}.", "Set the temperature to {x} degrees.", "Make it {x} degrees."),
    ),
    Kind(
        ("get_population", "population"),
        "Get the number of people in a city.",
        ("city", "place"),
        "string",
        _city,
        ("Tell me the population of {x}.",),
        ("What is the population of {x}?", "How many people live in {x}?"),
    ),
)


def _tool(name: str, description: str, argument: str, type_: str, rng: Random) -> Tool:
    properties: dict[str, Any] = {argument: {"type": type_}}
    if rng.random() < 0.2:
        properties[argument]["description"] = f"The {argument.replace('_', ' ')}"
    if rng.random() < 0.1:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.85:
        function["description"] = description if rng.random() < 0.7 else description[:-1]
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        parameters["required"] = [argument]
    function["parameters"] = parameters
    return {"type": "function", "function": function}


@dataclass(frozen=True)
class Toolbox:
    """The tools of one conversation, and a question with its call for each of them."""

    tools: tuple[Tool, ...]
    kinds: tuple[Kind | None, ...]

    def ask(self, rng: Random) -> tuple[str, str, dict[str, Any]]:
        """A question, and the name and arguments of the one right call."""
        index = rng.randrange(len(self.tools))
        function, kind = self.tools[index]["function"], self.kinds[index]
        argument, schema = next(iter(function["parameters"]["properties"].items()))
        if kind is None:
            value = (
                _number(rng) if schema["type"] == "integer" else rng.choice((lexicon.word, _name, lexicon.code))(rng)
            )
        else:
            value = kind.value(rng)
        commands: tuple[str, ...] = _BY_NAME
        questions: tuple[str, ...] = ()
        if kind is not None and rng.random() >= 0.1:
            commands, questions = kind.commands, kind.questions
        text = phrase(rng, commands, questions, x=str(value), tool=function["name"], argument=argument)
        return text, function["name"], {argument: value}


_BY_NAME = (
    "Use {tool} with {argument} {x}.",
    "Call {tool} with {argument} {x}.",
    "Call the tool {tool} with {argument} {x}.",
    "Use the {tool} tool for {x}.",
    "Use {tool} for {x}.",
    "Call {tool} for {x}.",
    "Call {tool}({argument}={x})",
)


def toolbox(rng: Random) -> Toolbox:
    """One to three tools; about one in four is of a kind never seen before."""
    tools: list[Tool] = []
    kinds: list[Kind | None] = []
    for kind in rng.sample(KINDS, rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.25:
            verb, noun, argument = lexicon.word(rng), lexicon.word(rng), lexicon.word(rng)
            type_ = rng.choice(("string", "string", "integer"))
            tools.append(_tool(f"{verb}_{noun}", f"{verb.capitalize()} the {noun}.", argument, type_, rng))
            kinds.append(None)
        else:
            tools.append(_tool(rng.choice(kind.names), kind.description, rng.choice(kind.arguments), kind.type, rng))
            kinds.append(kind)
    return Toolbox(tuple(tools), tuple(kinds))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def tool_call(rng: Random, box: Toolbox | None = None) -> Sample:
    box = box or toolbox(rng)
    text, name, arguments = box.ask(rng)
    key = json.dumps([name, arguments])
    return Sample(
        skill="tool_call", key=key, messages=(user(text),), answer=call_text(name, arguments), tools=box.tools
    )


def tool_answer(rng: Random, box: Toolbox | None = None) -> Sample:
    box = box or toolbox(rng)
    text, name, arguments = box.ask(rng)
    result = rng.choice(
        (
            lexicon.sentence(rng),
            _topic(rng),
            str(_number(rng)),
            json.dumps({lexicon.word(rng): rng.choice((_number(rng), lexicon.word(rng)))}),
            json.dumps({"temperature": rng.randint(-20, 40), "unit": "C"}),
            f"{rng.randint(-20, 40)} degrees and {rng.choice(('sunny', 'cloudy', 'rain', 'snow'))}",
        )
    )
    calling: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    messages = (user(text), calling, {"role": "tool", "content": result})
    key = json.dumps([name, arguments])  # the call is asked for on the way, so it decides the split
    if Sample(skill="tool_call", key=key, messages=messages, answer="").held_out:
        return tool_answer(rng, box)
    return Sample(
        skill="tool_answer", key=result, messages=messages, answer=f"The tool says: {result}", tools=box.tools
    )
