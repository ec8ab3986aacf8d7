import math

import msgspec
import pytest

from quire.core.errors import InvalidParameter
from quire.core.sampling import MAX_N, SamplingParams

BAD = {
    "n": [0, -1, MAX_N + 1, 1.0, True, "1", None],
    "temperature": [-0.1, math.nan, math.inf, "1", True],
    "top_p": [0.0, 1.1, -1, math.nan],
    "top_k": [-2, 1.5, True],
    "min_p": [-0.1, 1.1],
    "typical_p": [0, 1.01],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0.0, -1.0, math.inf],
    "seed": [1.5, 2**63, "x"],
    "max_tokens": [0, -5, 1.5],
    "min_tokens": [-1, 17],
    "logprobs": [-1, 65, True],
    "prompt_logprobs": [-1, 65],
    "truncate_prompt_tokens": [0, -1],
    "stop": ["abc", [""], ["x"] * 17, ["x" * 1025], [1]],
    "bad_words": [[""], ["x"] * 257],
    "stop_token_ids": [[-1], [1.5], [2**31], list(range(1025))],
    "allowed_token_ids": [[], [-1]],
    "logit_bias": [{1: 101.0}, {1: math.nan}, {-1: 1.0}, dict.fromkeys(range(1025), 1.0)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert caught.value.remedy
    assert len(str(caught.value)) < 400


def test_stop_strings_need_text():
    with pytest.raises(InvalidParameter):
        SamplingParams(stop=["x"], detokenize=False)


def test_samples_of_one_request_have_seeds_of_their_own():
    params = SamplingParams(n=3)
    children = [params.with_child_seed(index, 2**63 - 2) for index in range(3)]
    assert len({child.seed for child in children}) == 3
    assert all(child.n == 1 for child in children)


def test_parameters_cross_a_process_boundary_unchanged():
    params = SamplingParams(
        stop=["a"], logit_bias={5: -1.5}, allowed_token_ids=[1, 2], bad_words_token_ids=[[1, 2]], seed=-7, logprobs=3
    )
    data = msgspec.msgpack.encode(params)
    back = msgspec.msgpack.decode(data, type=SamplingParams)
    assert msgspec.msgpack.encode(back) == data
    assert back.logit_bias == {5: -1.5}
