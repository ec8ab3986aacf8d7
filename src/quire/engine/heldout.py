"""Questions with known answers, which a model was not trained on: `heldout.jsonl` beside its weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.core.errors import MissingFile
from quire.core.sampling import SamplingParams
from quire.engine.llm import LLM
from quire.models.divergence import TokenText
from quire.text.template import ChatTemplate
from quire.text.tokenizer import Tokenizer

FILE = "heldout.jsonl"
_LONGEST_ANSWER = 450

Question = Mapping[str, Any]
"""`skill`, `messages`, `answer`, and perhaps `tools`."""


def read_questions(directory: Path, per_skill: int | None) -> list[Question]:
    """The first so many of each skill, or all. Empty where there is no such file."""
    path = directory / FILE
    if not path.is_file():
        return []
    count: dict[str, int] = defaultdict(int)
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        count[question["skill"]] += 1
        if per_skill is None or count[question["skill"]] <= per_skill:
            questions.append(question)
    return questions


def as_texts(questions: Sequence[Question], directory: Path) -> list[TokenText]:
    """Each question with its answer; what is to be predicted are the answer's tokens and the end after them."""
    tokenizer, template = Tokenizer.load(directory), ChatTemplate.load(directory)
    if template is None:
        raise MissingFile(f"{directory} has held-out questions, but no chat template to ask them with.", param="model")
    texts = []
    for question in questions:
        prompt = template.render(question["messages"], tools=question.get("tools"))
        begin = tokenizer.encode(prompt, add_special_tokens=False)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answer = tokenizer.encode(question["answer"], add_special_tokens=False)
        texts.append(TokenText(token_ids=[*begin, *answer, *end], start=len(begin)))
    return texts


def accuracy(llm: LLM, questions: Sequence[Question]) -> dict[str, float]:
    """The share of exact answers, greedily found, skill by skill."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[json.dumps(question.get("tools"))].append(question)
    right: dict[str, list[bool]] = defaultdict(list)
    params = SamplingParams(temperature=0.0, max_tokens=_LONGEST_ANSWER)
    for tools, group in groups.items():
        outputs = llm.chat([each["messages"] for each in group], params, tools=json.loads(tools), progress=False)
        for question, output in zip(group, outputs, strict=True):
            right[question["skill"]].append(output.outputs[0].text.strip() == question["answer"].strip())
    return {skill: sum(each) / len(each) for skill, each in sorted(right.items())}
