"""The Python API on the built-in model: meaning, not only shapes."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quire
from quire import LLM, SamplingParams
from quire.core.errors import ConfigError, EngineError, InvalidParameter, PromptTooLong

ASSETS = Path(quire.__file__).parent / "assets" / "quire_tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=64)
LONG = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("quire-tiny", kv_cache_memory=0.05)


def heldout(per_skill: int) -> dict[str, list[dict]]:
    skills = defaultdict(list)
    for line in (ASSETS / "heldout.jsonl").read_text().splitlines():
        question = json.loads(line)
        if len(skills[question["skill"]]) < per_skill:
            skills[question["skill"]].append(question)
    return skills


def test_held_out_questions_are_answered_as_well_as_when_the_model_was_trained(llm):
    """A sample of each skill; the allowance is for the sample's size, not for the engine."""
    recorded = json.loads((ASSETS / "accuracy.json").read_text())
    skills = heldout(25)
    assert len(skills) >= 8
    for skill, questions in skills.items():
        right = 0
        by_tools = defaultdict(list)
        for question in questions:
            by_tools[json.dumps(question.get("tools"))].append(question)
        for tools, group in by_tools.items():
            outputs = llm.chat([q["messages"] for q in group], LONG, tools=json.loads(tools), progress=False)
            right += sum(o.outputs[0].text.strip() == q["answer"].strip() for o, q in zip(outputs, group, strict=True))
        assert right / len(questions) >= recorded["skills"][skill]["accuracy"] - 0.12, skill


def test_greedy_answers_are_those_of_transformers(llm):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.bfloat16)
    questions = [q for group in heldout(2).values() for q in group if not q.get("tools")]
    outputs = llm.chat([q["messages"] for q in questions], GREEDY, progress=False)
    same = 0
    for question, output in zip(questions, outputs, strict=True):
        prompt = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"]
        assert output.prompt_token_ids == ids[0].tolist()
        with torch.no_grad():
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        same += output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()
    assert same >= len(questions) - 1  # bfloat16 may round a near-tie the other way


def test_samples_of_one_prompt_differ_and_share_its_prefix(llm):
    messages = [{"role": "user", "content": "Hello there! " * 8}]
    [output] = llm.chat(messages, SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12), progress=False)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    [again] = llm.chat(messages, SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12), progress=False)
    assert [sample.token_ids for sample in again.outputs] == [sample.token_ids for sample in output.outputs]
    assert again.num_cached_tokens > 0


def test_a_stream_is_the_answer_in_pieces(llm):
    messages = [{"role": "user", "content": "Count from 1 to 12."}]
    pieces = list(llm.stream_chat(messages, GREEDY))
    [output] = llm.chat(messages, GREEDY, progress=False)
    assert len(pieces) > 5
    assert "".join(pieces) == output.outputs[0].text


def test_a_stream_that_is_closed_frees_what_it_held(llm):
    stream = llm.stream_chat([{"role": "user", "content": "Count from 1 to 30."}], GREEDY)
    next(stream)
    stream.close()
    assert not llm._engine.has_work
    llm._engine.check_integrity()


def test_a_stream_goes_on_while_others_are_served(llm):
    messages = [{"role": "user", "content": "Count from 1 to 12."}]
    [alone] = llm.chat(messages, GREEDY, progress=False)
    first, second = llm.stream_chat(messages, GREEDY), llm.stream_chat(messages, GREEDY)
    pieces = [next(first), next(second), next(first)]
    [between] = llm.chat(messages, GREEDY, progress=False)
    assert between.outputs[0].text == alone.outputs[0].text
    assert pieces[0] + pieces[2] + "".join(first) == alone.outputs[0].text
    assert pieces[1] + "".join(second) == alone.outputs[0].text
    assert not llm._jobs
    llm._engine.check_integrity()


def test_a_step_that_breaks_ends_what_was_running_and_no_more(llm):
    stream = llm.stream_complete("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    next(stream)
    runner = llm._engine._runner
    kv, runner._kv = runner._kv, None  # as good a fault as any
    with pytest.raises(AttributeError):
        llm.generate(["a"], GREEDY, progress=False)
    runner._kv = kv
    with pytest.raises(EngineError, match="did not end"):
        list(stream)
    llm._engine.check_integrity()
    assert not llm._engine.has_work
    assert llm.generate(["a"], GREEDY, progress=False)[0].outputs[0].token_ids


def test_an_error_of_one_prompt_is_raised_and_frees_the_others(llm):
    nothing_left = SamplingParams(temperature=0, allowed_token_ids=[7], stop_token_ids=[7], min_tokens=1, max_tokens=5)
    with pytest.raises(InvalidParameter, match="leave no token"):
        llm.generate(["a", "b"], [GREEDY, nothing_left], progress=False)
    assert not llm._engine.has_work
    assert not llm._jobs


def test_one_prompt_of_token_ids_needs_no_list_around_it(llm):
    [one], [wrapped] = (llm.generate(ids, GREEDY, progress=False) for ids in ([5, 6, 7], [[5, 6, 7]]))
    assert one.prompt_token_ids == [5, 6, 7]
    assert one.outputs[0].token_ids == wrapped.outputs[0].token_ids


def test_the_model_may_be_a_path_and_arguments_are_checked():
    assert LLM(ASSETS, kv_cache_memory=0.01).generate("a", GREEDY, progress=False)[0].prompt == "a"
    for wrong in ({"max_model_len": "12"}, {"dtype": "int4"}, {"kv_cache_memory": -1.0}, {"max_len": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LLM(ASSETS, **wrong)


def test_what_nobody_asks_for_is_not_kept_for_ever():
    llm = LLM("quire-tiny", kv_cache_memory=0.01, max_num_seqs=1, threads=1)
    steps = llm._engine._iteration_tokens
    assert steps.maxlen is not None
    llm.generate("a", SamplingParams(max_tokens=3, temperature=0, ignore_eos=True), progress=False)
    assert len(steps) == 3
    assert llm._engine.stats().iteration_tokens == [1, 1, 1]
    assert not steps


def test_a_stop_string_ends_the_text_before_it(llm):
    messages = [{"role": "user", "content": "Count from 1 to 12."}]
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=64, stop=["7"]), progress=False)
    [sample] = output.outputs
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "7")
    assert "6" in sample.text
    assert "7" not in sample.text


def test_logprobs_are_of_each_token_and_sum_to_one_over_the_vocabulary(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=1)
    [output] = llm.generate(["The quick brown fox"], params, progress=False)
    [sample] = output.outputs
    assert sample.logprobs is not None
    assert [entry.token_id for entry in sample.logprobs] == sample.token_ids
    assert all(entry.rank == 1 and entry.top_ids[0] == entry.token_id for entry in sample.logprobs)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_more_prompts_than_the_queue_holds():
    llm = LLM("quire-tiny", kv_cache_memory=0.02, max_num_queued_reqs=3, max_num_seqs=2)
    outputs = llm.generate([f"{i} and" for i in range(20)], SamplingParams(max_tokens=2, temperature=0))
    assert [output.prompt for output in outputs] == [f"{i} and" for i in range(20)]
    assert all(len(output.outputs[0].token_ids) in (1, 2) for output in outputs)


def test_a_bad_request_is_refused_and_the_next_one_served(llm):
    with pytest.raises(PromptTooLong):
        llm.generate(["word " * 100_000], GREEDY, progress=False)
    with pytest.raises(InvalidParameter):
        llm.generate([[10**9]], GREEDY, progress=False)
    with pytest.raises(InvalidParameter):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    with pytest.raises(InvalidParameter, match="None"):
        llm.generate(["a", None], GREEDY, progress=False)
    with pytest.raises(InvalidParameter, match="temperature"):
        llm.generate("a", {"temperature": 0}, progress=False)
    assert llm.generate(["a"], GREEDY, progress=False)[0].outputs[0].token_ids
    llm._engine.check_integrity()
