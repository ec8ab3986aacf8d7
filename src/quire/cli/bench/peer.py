"""`transformers` as the peer to compare with: it generates the same requests, one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.cli.bench.workload import BenchRequest
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError


class TransformersPeer:
    """Loads the checkpoint in `directory` in the engine's dtype and with its number of threads."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ConfigError(
                "--backend transformers needs transformers, which is not installed.",
                param="backend",
                remedy="pip install transformers.",
            ) from error
        import torch

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=config.dtype, local_files_only=True)
        self._model.eval()

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    def run(self, requests: Sequence[BenchRequest]) -> tuple[float, int, int]:
        """Seconds, prompt tokens and output tokens of all requests, greedily, one after another."""
        start = time.perf_counter()
        prompt_tokens = output_tokens = 0
        for request in requests:
            prompt = self._torch.tensor([request.prompt])
            with self._torch.inference_mode():
                generated = self._model.generate(
                    prompt,
                    attention_mask=self._torch.ones_like(prompt),
                    do_sample=False,
                    min_new_tokens=request.output_len,
                    max_new_tokens=request.output_len,
                    pad_token_id=0,
                )
            prompt_tokens += prompt.shape[1]
            output_tokens += generated.shape[1] - prompt.shape[1]
        return time.perf_counter() - start, prompt_tokens, output_tokens
