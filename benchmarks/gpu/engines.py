"""The engines, each loaded in a process of its own: quire, vLLM and transformers' continuous batching."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.hollow import random_weights
from benchmarks.gpu.workloads import LONGEST, Engine

UNKNOWN_ROOM = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`batch`: most requests at once. `memory_utilization`: see each engine. `options`: quire's further settings."""

    batch: int
    device: str
    memory_utilization: float
    options: Mapping[str, Any]


class Quire:
    """The engine itself, as `quire.LLM` has it: without HTTP, tokenizer and other processes."""

    def __init__(self, model: Path, settings: Settings) -> None:
        from quire.config.engine import EngineConfig
        from quire.engine.build import build_engine

        config = EngineConfig(
            **{
                "model": str(model),
                "device": settings.device,
                "dtype": "bfloat16",
                "max_model_len": LONGEST,
                "max_num_seqs": settings.batch,
                "memory_utilization": settings.memory_utilization,
                "enable_prefix_caching": False,
                **settings.options,
            }
        )
        with random_weights():
            self._engine = build_engine(config)
        self._names = itertools.count()

    def room(self) -> int:
        info = self._engine.info
        return (info.num_blocks - 1) * info.block_size

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, temperature: float = 0.0
    ) -> float:
        from quire.core.request import EngineRequest, FinishReason
        from quire.core.sampling import SamplingParams

        engine = self._engine
        begin = time.perf_counter()
        for prompt, output_len in zip(prompts, output_lens, strict=True):
            number = next(self._names)
            sampling = SamplingParams(temperature=temperature, max_tokens=output_len, ignore_eos=True, seed=number)
            request = EngineRequest(
                request_id=str(number), prompt_token_ids=prompt, sampling=sampling, arrival_time=time.monotonic()
            )
            refused = engine.submit(request)
            assert refused is None, refused
        tokens = 0
        while engine.has_work:
            for output in engine.step():
                tokens += len(output.token_ids)
                assert output.finish_reason in (None, FinishReason.LENGTH), output
        seconds = time.perf_counter() - begin
        assert tokens == sum(output_lens), f"{tokens} tokens, {sum(output_lens)} asked for"
        return seconds


class VLLM:
    """vLLM in its own configuration, with the memory and the batch that quire gets."""

    def __init__(self, model: Path, settings: Settings) -> None:
        os.environ.update(
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_USE_FLASHINFER_SAMPLER="0",  # would compile on first use
            VLLM_LOGGING_LEVEL="WARNING",
        )
        os.environ.setdefault("VLLM_CACHE_ROOT", "/tmp/quire-bench-vllm-cache")
        from vllm import LLM

        self._llm = LLM(
            str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=LONGEST,
            max_num_seqs=settings.batch,
            gpu_memory_utilization=settings.memory_utilization,
            enable_prefix_caching=False,
            generation_config="vllm",
            disable_log_stats=True,
        )

    def room(self) -> int:
        cache = self._llm.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size) if cache.num_gpu_blocks else UNKNOWN_ROOM

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, temperature: float = 0.0
    ) -> float:
        from vllm import SamplingParams

        sampling = [
            SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        begin = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == sum(output_lens), f"{tokens} tokens, {sum(output_lens)} asked for"
        return seconds


class Transformers:
    """Continuous batching over paged attention: what `generate_batch` runs, kept open between calls. Greedy."""

    def __init__(self, model: Path, settings: Settings) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("cuda" if settings.device == "auto" else settings.device):
            loaded: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        generation = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)
        self._open = ExitStack()  # for as long as the process lives
        self._manager = self._open.enter_context(
            loaded.eval().continuous_batching_context_manager(generation_config=generation, persistent_manager=True)
        )
        self._names = itertools.count()

    def room(self) -> int:
        """It waits for room by itself."""
        return UNKNOWN_ROOM

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, temperature: float = 0.0
    ) -> float:
        begin = time.perf_counter()
        for prompt, output_len in zip(prompts, output_lens, strict=True):
            self._manager.add_request(list(prompt), request_id=str(next(self._names)), max_new_tokens=output_len)
        tokens = done = 0
        while done < len(prompts):
            result = self._manager.get_result(timeout=1)
            if result is None:
                assert self._manager.is_running(), "transformers' generation ended"
            elif result.is_finished():
                assert result.error is None, result.error
                done, tokens = done + 1, tokens + len(result.generated_tokens)
        seconds = time.perf_counter() - begin
        assert tokens == sum(output_lens), f"{tokens} tokens, {sum(output_lens)} asked for"
        return seconds


ENGINES: Mapping[str, Callable[[Path, Settings], Engine]] = {
    "quire": Quire,
    "vllm": VLLM,
    "transformers": Transformers,
}
