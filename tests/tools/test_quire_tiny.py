"""The built-in model: its data generator, its tokenizer, its files, and what it answers."""

import json
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quire_tiny import conversations, evaluate, tokenizer, tool_skills
from quire_tiny.batches import batches
from quire_tiny.sample import Sample

ASSETS = Path(__file__).parents[2] / "src" / "quire" / "assets" / "quire_tiny"
AIMS = {"addition": 0.95, "copy": 0.95, "json_field": 0.95}


@pytest.fixture(scope="module")
def records() -> list[evaluate.Record]:
    return evaluate.read_held_out(ASSETS)


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(2)
    return evaluate.load(ASSETS)


@pytest.fixture(scope="module")
def accuracy() -> dict[str, float]:
    return evaluate.read_accuracy(ASSETS)


def test_same_seed_same_conversations():
    def make(seed: int) -> list[conversations.Conversation]:
        rng = Random(seed)
        return [conversations.conversation(rng) for _ in range(50)]

    assert make(3) == make(3)
    assert make(3) != make(4)


def test_shipped_held_out_set_is_the_generated_one(records):
    assert records == json.loads(json.dumps(list(conversations.held_out())))


def test_held_out_set_has_hundreds_of_distinct_questions_per_skill(records):
    questions = {(r["skill"], json.dumps([r["messages"], r.get("tools")])) for r in records}
    assert len(questions) == len(records)
    assert min(Counter(r["skill"] for r in records).values()) >= 200


def test_training_never_asks_held_out_content(records):
    """In so many words; for a tool call it is the call that is held out, as the words may fit another tool."""
    worded = [r for r in records if r["skill"] not in ("story", "memory", "tool_answer", "tool_call")]
    asked = {r["messages"][-1]["content"] for r in worded}
    calls = {r["answer"] for r in records if r["skill"] == "tool_call"}
    rng = Random(1)
    for _ in range(4000):
        for message in conversations.conversation(rng).messages:
            if message["role"] == "user":
                assert message["content"] not in asked
            made = [each["function"] for each in message.get("tool_calls", [])]
            written = {message["content"], *(tool_skills.call_text(each["name"], each["arguments"]) for each in made)}
            assert not written & calls


def test_sums_are_split_by_operands_in_either_order(records):
    held_out = {frozenset((a, b)) for a in range(100) for b in range(a, 100) if _sum(a, b).held_out}
    assert 0.05 < len(held_out) / 5050 < 0.15
    rng = Random(2)
    for _ in range(3000):
        sample = conversations.training_turn(rng)
        if sample.skill == "addition":
            assert frozenset(map(int, sample.key.split())) not in held_out


def _sum(a: int, b: int) -> Sample:
    return Sample(skill="addition", key=f"{a} {b}", messages=(), answer=str(a + b))


def test_batches_are_deterministic_and_train_only_answers(shipped):
    _, tok = shipped
    first, again = (list(islice(batches(tok, 5, 2048), 3)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.inputs_bt, other.inputs_bt)
        assert torch.equal(one.weights_bt, other.weights_bt)
        assert one.inputs_bt.numel() == 2048
        assert not one.weights_bt[one.documents_bt < 0].any()
        follows = one.documents_bt[:, 1:] == one.documents_bt[:, :-1]
        assert torch.equal(one.targets_bt[:, :-1][follows], one.inputs_bt[:, 1:][follows])


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(shipped_tokenizer_text, text):
    encode, decode = shipped_tokenizer_text
    assert decode(encode(text)) == text


@pytest.fixture(scope="module")
def shipped_tokenizer_text(shipped):
    _, tok = shipped
    return (
        lambda text: tok.encode(text, add_special_tokens=False),
        lambda ids: tok.decode(ids, clean_up_tokenization_spaces=False),
    )


def test_tokens_that_must_be_single(shipped):
    _, tok = shipped
    for text in (*tokenizer.SPECIAL, *tokenizer.MARKERS, *"0123456789"):
        assert len(tok.encode(text)) == 1, text
    assert len(tok.encode("2048")) == 4
    assert set(tok.all_special_tokens) <= set(tokenizer.SPECIAL)


def test_chat_template_renders_tools_calls_and_responses(shipped):
    _, tok = shipped
    tool = {
        "type": "function",
        "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}
    as_text = {"type": "function", "function": {"name": "get_time", "arguments": '{"city": "Rome"}'}}
    rendered = [
        tok.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Time in Rome?"}]},
                {"role": "assistant", "content": None, "tool_calls": [each]},
                {"role": "tool", "content": "noon"},
            ],
            tools=[tool],
            add_generation_prompt=True,
            tokenize=False,
        )
        for each in (call, as_text)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert json.dumps(tool) in rendered[0]
    assert rendered[0].endswith(
        "<|im_start|>user\nTime in Rome?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_package_is_small(records):
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(sizes.values()) <= 10_000_000, sizes
    assert sizes[evaluate.HELD_OUT_FILE] <= 1_000_000


def test_checkpoint_is_a_qwen3_of_at_most_four_million_bfloat16_parameters():
    config = json.loads((ASSETS / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] <= 4096
    with safe_open(ASSETS / "model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 (not a mapping)
        assert all(each.get_dtype() == "BF16" for each in shapes)
        assert sum(torch.Size(each.get_shape()).numel() for each in shapes) <= 4_000_000


def test_recorded_accuracy_meets_the_aims(accuracy, records):
    assert set(accuracy) == {record["skill"] for record in records}
    assert all(accuracy[skill] >= aim for skill, aim in AIMS.items()), accuracy


def test_answers_a_sample_of_the_held_out_questions(shipped, records, accuracy):
    """Ten short ones of each skill: all together close to what was recorded, and no skill lost."""
    by_skill = defaultdict(list)
    for record in records:
        if len(record["answer"]) <= 60:
            by_skill[record["skill"]].append(record)
    sample = [record for each in by_skill.values() for record in Random(0).sample(each, 10)]
    result = evaluate.accuracy(sample, evaluate.answers(*shipped, sample, max_new_tokens=50))
    recorded = {skill: accuracy[skill] for skill in result}
    assert len(result) >= 12
    assert fmean(result.values()) >= fmean(recorded.values()) - 0.05, result
    assert all(result[skill] >= recorded[skill] - 0.3 for skill in result), result


def test_remembers_over_turns_and_streams_long_counts(shipped):
    questions = [
        {"messages": [{"role": "user", "content": "Count from 1 to 40."}]},
        {
            "messages": [
                {"role": "user", "content": "My name is Ada."},
                {"role": "assistant", "content": "Nice to meet you, Ada!"},
                {"role": "user", "content": "What is my name?"},
            ]
        },
    ]
    counted, named = evaluate.answers(*shipped, questions, max_new_tokens=200)
    assert counted == ", ".join(map(str, range(1, 41)))
    assert named == "Your name is Ada."
