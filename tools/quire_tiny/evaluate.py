"""Asks every held-out question and records exact-match accuracy: `python -m quire_tiny.evaluate FOLDER`."""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire_tiny import conversations

Record = dict[str, Any]
HELD_OUT_FILE, ACCURACY_FILE = "heldout.jsonl", "accuracy.json"


def read_held_out(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / HELD_OUT_FILE).read_text(encoding="utf-8").splitlines()]


def write_held_out(folder: Path) -> None:
    lines = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in conversations.held_out())
    (folder / HELD_OUT_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def prompt_ids(tokenizer: Any, record: Record) -> list[int]:
    text = tokenizer.apply_chat_template(
        record["messages"], tools=record.get("tools"), add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer.encode(text)
    return ids


def _groups(prompts: Sequence[list[int]], most: int = 128) -> Iterator[list[int]]:
    """Indices of prompts of one length: batches without padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for _, indices in sorted(by_length.items()):
        yield from (indices[first : first + most] for first in range(0, len(indices), most))


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, records: Sequence[Record], max_new_tokens: int = 450) -> list[str]:
    """Greedy answers, special tokens left out."""
    prompts = [prompt_ids(tokenizer, record) for record in records]
    texts = [""] * len(records)
    for indices in _groups(prompts):
        inputs = torch.tensor([prompts[index] for index in indices])
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=max_new_tokens,
        )
        for index, output in zip(indices, outputs[:, inputs.shape[1] :], strict=True):
            texts[index] = tokenizer.decode(output, skip_special_tokens=True)
    return texts


def load(folder: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), tokenizer


def accuracy(records: Sequence[Record], texts: Sequence[str]) -> dict[str, float]:
    """The share of exact answers, skill by skill."""
    right: dict[str, list[bool]] = defaultdict(list)
    for record, text in zip(records, texts, strict=True):
        right[record["skill"]].append(text == record["answer"])
    return {skill: round(sum(each) / len(each), 4) for skill, each in right.items()}


def write_accuracy(folder: Path, records: Sequence[Record], result: dict[str, float]) -> None:
    asked = Counter(record["skill"] for record in records)
    skills = {skill: {"accuracy": share, "questions": asked[skill]} for skill, share in result.items()}
    (folder / ACCURACY_FILE).write_text(json.dumps({"skills": skills}, indent=2) + "\n")


def read_accuracy(folder: Path) -> dict[str, float]:
    recorded = json.loads((folder / ACCURACY_FILE).read_text())
    return {skill: each["accuracy"] for skill, each in recorded["skills"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the checkpoint; heldout.jsonl and accuracy.json are written to it")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers per skill")
    parser.add_argument("--limit", type=int, default=0, help="ask so many questions per skill, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model, tokenizer = load(arguments.folder)
    if arguments.limit:
        records = list(conversations.held_out(per_skill=arguments.limit))
    else:
        write_held_out(arguments.folder)
        records = read_held_out(arguments.folder)
    texts = answers(model, tokenizer, records)
    result = accuracy(records, texts)
    shown: dict[str, int] = defaultdict(int)
    for record, text in zip(records, texts, strict=True):
        if text != record["answer"] and shown[record["skill"]] < arguments.wrong:
            shown[record["skill"]] += 1
            print(f"{record['skill']}: {record['messages'][-1]['content']!r}\n  {record['answer']!r}\n  {text!r}")
    print(json.dumps(result, indent=2))
    if not arguments.limit:
        write_accuracy(arguments.folder, records, result)


if __name__ == "__main__":
    main()
