"""The plan: its figures are those of the model once loaded, and what it suggests does help."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.cache.ledger import RESERVE
from quire.cache.pool import BlockPool
from quire.config.engine import EngineConfig
from quire.core.errors import QuireError, TruncatedFile
from quire.models.load import load_model
from quire.models.machine import measure_bandwidth, measure_flops
from quire.models.parameters import Parameter
from quire.models.plan import Plan, plan_model
from quire.models.quantization.rounding import round_weight
from quire.models.quantization.scheme import rounded_scheme
from quire.ops.cpu.library import usable_isas
from quire.ops.cpu.linear import CpuLinear
from quire.ops.target import Target

GIB = 1 << 30
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def plan(directory: Path, *, memory: int = GIB, **config: object) -> Plan:
    return plan_model(directory, EngineConfig(**config), memory_available=memory, bandwidth=10e9, flops=1e12)


def write_model(directory: Path, tie: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    config = transformers.Qwen3Config(**SHAPE, tie_word_embeddings=tie)
    transformers.Qwen3ForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer sees all of the past, five a window."""
    directory = tmp_path_factory.mktemp("windowed")
    sizes = SHAPE | {"num_hidden_layers": 6}
    config = transformers.Gemma3TextConfig(**sizes, sliding_window=200, eos_token_id=2, bos_token_id=1)
    transformers.Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


def edit_config(source: Path, target: Path, **changes: object) -> Path:
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    link = target / "model.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(source / "model.safetensors")
    return target


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_sizes_are_those_of_the_loaded_model(tmp_path: Path, tie: bool, dtype: str) -> None:
    directory = write_model(tmp_path, tie, torch.float16)
    planned, loaded = plan(directory, dtype=dtype), load_model(directory, dtype=dtype)
    assert planned.dtype == str(loaded.dtype).removeprefix("torch.")
    assert planned.weight_bytes == loaded.weight_bytes
    assert planned.table_bytes == loaded.decoder.table_bytes
    assert planned.weight_bytes_by_dtype == {"F16": planned.num_parameters * 2}
    assert planned.kv_bytes_per_token == loaded.kv_bytes_per_block(16) // 16
    assert planned.longest == loaded.max_model_len
    assert planned.architecture == "Qwen3ForCausalLM"
    assert planned.known


def test_a_tied_head_that_is_stored_all_the_same_is_not_counted(tmp_path: Path) -> None:
    directory = write_model(tmp_path, tie=True)
    tensors = {"lm_head.weight": torch.zeros(300, 32)}
    expected = plan(directory).weight_bytes
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    save_file(tensors, directory / "b.safetensors")
    assert plan(directory).weight_bytes == expected == load_model(directory).weight_bytes


def test_it_fits(model: Path) -> None:
    planned = plan(model, max_num_seqs=4)
    assert planned.fits
    assert planned.max_model_len == 4096
    assert planned.suggestions == ()
    assert planned.verdict == "Fits, with the whole context of 4,096 tokens."
    assert planned.num_kv_tokens == 2 * 4 * 4096  # no more than that is ever of use
    # Of four sequences, as many blocks as eight need; of which only four run.
    assert planned.num_sequences == {1024: 4, 4096: 4}
    # Four of 1,024 tokens need all blocks, but one in a hundred is kept from newcomers.
    assert plan(model, max_num_seqs=4, num_kv_blocks=129).num_sequences == {1024: 3, 4096: 1}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    memory=st.integers(0, 64 << 20),
    max_model_len=st.none() | st.integers(1, 4096),
    kv_cache_memory=st.none() | st.floats(1e-6, 0.05),
    max_num_seqs=st.integers(1, 64),
)
def test_capacity_is_what_the_pool_gives(
    model: Path, memory: int, max_model_len: int | None, kv_cache_memory: float | None, max_num_seqs: int
) -> None:
    planned = plan(
        model,
        memory=memory,
        max_model_len=max_model_len,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
    )
    assert planned.rows()
    if not planned.fits:
        assert planned.verdict.startswith("Does not fit")
        assert planned.num_sequences == {}
        assert planned.num_kv_tokens is None
        return
    assert planned.kv_cache_bytes is not None
    assert planned.num_kv_tokens is not None
    assert planned.weight_bytes + planned.table_bytes + planned.activation_bytes + planned.kv_cache_bytes <= memory
    block_size = EngineConfig(model=str(model)).block_size
    num_blocks = planned.num_kv_tokens // block_size + 1
    assert planned.kv_cache_bytes == num_blocks * block_size * planned.kv_bytes_per_token
    for length, count in planned.num_sequences.items():
        pool = BlockPool(num_blocks, block_size)
        for _ in range(count):
            pool.allocate(math.ceil(length / block_size))
        reserve = (num_blocks - 1) // RESERVE if count else 0
        assert count == max_num_seqs or pool.num_free - reserve < math.ceil(length / block_size)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    memory=st.integers(1 << 20, 24 << 20),
    max_model_len=st.none() | st.integers(1, 4096),
    kv_cache_memory=st.none() | st.floats(0.0001, 0.05),
)
@example(memory=4_981_586, max_model_len=None, kv_cache_memory=0.00075)  # 0.01 GiB, rounded up, is not there
@example(memory=11_291_464, max_model_len=2473, kv_cache_memory=0.0017)
@pytest.mark.parametrize("windows", [False, True])
def test_a_suggested_flag_helps(
    model: Path, windowed: Path, windows: bool, memory: int, max_model_len: int | None, kv_cache_memory: float | None
) -> None:
    """One flag for the KV cache, as suggested, makes it fit; or makes the context whole if it fitted already."""
    model = windowed if windows else model
    config = {"max_model_len": max_model_len, "kv_cache_memory": kv_cache_memory, "max_num_batched_tokens": 64}
    before = plan(model, memory=memory, **config)
    for text in before.suggestions:
        flag, _, value = text.partition(" ")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in {"max_model_len", "kv_cache_memory", "memory_utilization"}:
            continue
        after = plan(model, memory=memory, **config | {name: json.loads(value)})
        assert after.fits
        if before.fits:
            assert after.max_model_len == after.longest


def test_layers_with_a_window_are_groups_of_their_own(windowed: Path) -> None:
    planned = plan(windowed, max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=512, block_size=16)
    assert planned.kv_layers_per_group == 1
    assert planned.kv_groups == {"all of the past": 1, "a window of 200 tokens": 5}
    assert dict(planned.rows())["KV groups of 1 layers"]
    layer_bytes = planned.kv_bytes_per_token * 16 // 6
    full, limited, in_step = 2048 // 16, 5 * 14, 5 * 32
    assert planned.kv_cache_bytes == (2 * 4 * (full + limited) + in_step + 1) * layer_bytes
    assert planned.num_sequences[2048] == 4  # though there are blocks for more
    assert plan(windowed, max_model_len=200).kv_groups == {"all of the past": 1}


def test_a_token_reads_what_its_layers_see(windowed: Path) -> None:
    """With a context of 1,024 tokens, one layer reads them all, and five read 200."""
    planned = plan(windowed, max_num_seqs=1)
    step_bytes = 10e9 / planned.decode_tokens_per_s[1]
    assert step_bytes - planned.weight_bytes == pytest.approx((1024 + 5 * 200) * planned.kv_bytes_per_token / 6)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_kv_blocks=st.integers(20, 700),
    max_num_batched_tokens=st.sampled_from([64, 300]),
    max_model_len=st.sampled_from([None, 512, 1500]),
)
def test_so_many_sequences_are_served_at_once(
    windowed: Path, num_kv_blocks: int, max_num_batched_tokens: int, max_model_len: int | None
) -> None:
    """What the pool holds, block by block, while sequences are computed one after the other, and stay."""
    settings = {"max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len, "block_size": 16}
    planned = plan(windowed, num_kv_blocks=num_kv_blocks, **settings)
    sights = [
        sight for sight in (ALL_OF_THE_PAST, Sight(window=200)) for _ in range(planned.kv_groups.get(str(sight), 0))
    ]
    for length, count in planned.num_sequences.items():
        last = 1 if count == 1 else max_num_batched_tokens  # who is alone may take small steps
        held = max(_blocks(sights, start, 1) for start in range(length))
        computing = max(_blocks(sights, start, min(length, start + last) - start) for start in range(length))
        usable = num_kv_blocks - 1
        kept_back = usable // RESERVE
        assert (count - 1) * held + computing <= usable - (kept_back if count > 1 else 0)
        largest = max(
            _blocks(sights, start, min(length, start + max_num_batched_tokens) - start) for start in range(length)
        )
        assert count * held + largest > usable - kept_back


def _blocks(sights: list[Sight], start: int, num_tokens: int) -> int:
    """Held while so many tokens from `start` are computed."""
    first = [max(0, start - sight.window + 1) if sight.window else 0 for sight in sights]
    return sum((start + num_tokens - 1) // 16 - position // 16 + 1 for position in first)


def test_what_helps_when_memory_is_short(model: Path) -> None:
    small = plan(model, memory=300_000)
    assert not small.fits
    assert "--dtype bfloat16" in small.suggestions
    assert "--max-num-batched-tokens 256" in small.suggestions
    assert small.suggestions[-1].endswith("more memory")
    assert "Does not fit" in dict(small.rows())["verdict"]


def test_a_context_that_the_model_does_not_have(model: Path) -> None:
    planned = plan(model, max_model_len=5000)
    assert "positions end at 4096" in planned.notes[0]


def test_rates(model: Path) -> None:
    planned = plan(model, max_num_seqs=8)
    embedding = 300 * 32
    read = planned.weight_bytes - 4 * embedding  # of the input embedding only a row is read
    assert planned.decode_tokens_per_s == {
        1: pytest.approx(10e9 / (read + 1024 * planned.kv_bytes_per_token)),
        8: pytest.approx(8 * 10e9 / (read + 8 * 1024 * planned.kv_bytes_per_token)),
    }
    assert planned.prefill_tokens_per_s == pytest.approx(1e12 / (2 * (planned.num_parameters - embedding)))


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    reference = plan(model)
    directory = edit_config(model, tmp_path, architectures=["NewestForCausalLM"])
    planned = plan(directory)
    assert not planned.known
    assert "Unknown architecture" in planned.notes[0]
    assert planned.architecture == "NewestForCausalLM"
    same = ["num_parameters", "weight_bytes", "kv_bytes_per_token", "activation_bytes", "num_sequences", "longest"]
    for field in same:
        assert getattr(planned, field) == getattr(reference, field)
    assert planned.verdict.startswith("Would fit, if it could be run")
    assert "(unknown architecture)" in dict(planned.rows())["architecture"]


def test_sizes_of_the_text_part(model: Path, tmp_path: Path) -> None:
    text = json.loads((model / "config.json").read_text())
    directory = edit_config(model, tmp_path, architectures=["SeesForConditionalGeneration"])
    (directory / "config.json").write_text(json.dumps({"architectures": ["Sees"], "text_config": text}))
    assert plan(directory).kv_bytes_per_token == plan(model).kv_bytes_per_token


def test_a_config_without_sizes(model: Path, tmp_path: Path) -> None:
    directory = edit_config(model, tmp_path)
    (directory / "config.json").write_text("{}")
    planned = plan(directory)
    assert planned.fits
    assert planned.kv_bytes_per_token is None
    assert planned.architecture == "unnamed"
    assert "unknown" in dict(planned.rows())["KV cache per token"]
    assert not plan(directory, memory=1000).fits


def test_quantised_weights_stay_as_stored(model: Path, tmp_path: Path) -> None:
    directory = edit_config(model, tmp_path, quantization_config={"quant_method": "fp8"})
    (directory / "model.safetensors").unlink()
    tensors = {"w": torch.zeros(10, 10, dtype=torch.float8_e4m3fn), "w_scale": torch.ones(10, dtype=torch.float16)}
    save_file(tensors, directory / "model.safetensors")
    planned = plan(directory, dtype="float32")
    assert planned.weight_bytes == 100 + 40
    assert planned.known
    assert "cannot be run" in planned.notes[0]


def test_a_truncated_checkpoint(model: Path, tmp_path: Path) -> None:
    directory = edit_config(model, tmp_path)
    data = (model / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(TruncatedFile):
        plan(directory)


VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3) | st.just([])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from([*SHAPE, "architectures", "torch_dtype", "dtype", "text_config", "rope_parameters"]),
        VALUES,
        max_size=4,
    )
)
@example(changes={"num_hidden_layers": 34_749_663_911})
def test_any_config_gives_a_plan_or_a_clear_error(model: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    directory = edit_config(model, tmp_path, **changes)
    try:
        planned = plan(directory)
    except QuireError:
        return
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in planned.rows())


def test_as_data(model: Path) -> None:
    planned = plan(model)
    data = json.loads(json.dumps(planned.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(Plan)}
    assert data["weight_bytes"] == planned.weight_bytes


def test_measuring_is_quick_and_plausible(model: Path) -> None:
    assert 1e8 < measure_bandwidth(2, seconds=0.05) < 1e14
    assert 1e8 < measure_flops(seconds=0.01) < 1e16
    measured = plan_model(model, EngineConfig(threads=1))
    assert measured.memory_available > 0
    assert measured.bandwidth > 1e8


def test_planning_loads_no_torch(model: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from quire.config.engine import EngineConfig\n"
        "from quire.models.plan import plan_model\n"
        "print(plan_model(Path(sys.argv[1]), EngineConfig(), bandwidth=1e9, flops=1e9).verdict)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True, text=True)
    assert run.stdout.startswith("Fits")


@pytest.mark.skipif(not usable_isas(), reason="made without a compiler")
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_rounded_weight_takes_what_is_planned_for_it(quantization: str) -> None:
    path, shape = "layers.0.mlp.up.weight", (256, 512)
    scheme = rounded_scheme(quantization, path, shape)
    assert scheme is not None
    rounded = round_weight(torch.randn(*shape).bfloat16(), scheme)
    packed = CpuLinear(Target("cpu", torch.bfloat16, threads=1)).pack(rounded)
    assert Parameter(path=path, tensor=path, shape=shape, scheme=scheme).nbytes(2, compiled=True) == packed.nbytes
