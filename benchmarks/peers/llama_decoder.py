"""Greedy decoding of several sequences through llama-cpp-python's low-level API. Runs in llama.cpp's environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np

from benchmarks.peers.workloads import common_prefix_len

BATCH = 2048
"""Most tokens in one call, as in llama.cpp's own tools."""
LEAST_SHARED = 16
"""A common prefix from this length on is computed once and copied."""

Entry = tuple[int, int, int, bool]
"""Token, position, sequence, and whether its logits are wanted."""


class Decoder:
    """Called with prompts and a number of new tokens; see `peer.Generate`.

    One sequence and many have a context each, as every sequence gets an equal share of a context's cells. That of many
    (`most` of `longest_of_many` tokens) is made at its first use.
    """

    def __init__(self, model: Path, *, threads: int, longest: int, most: int, longest_of_many: int) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._threads = threads
        self._many = (most, longest_of_many)
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        self._contexts = {False: self._new_context(1, longest)}

    def __call__(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        several = len(prompts) > 1
        if several not in self._contexts:
            self._contexts[several] = self._new_context(*self._many)
        context = self._contexts[several]
        memory = api.llama_get_memory(context)
        api.llama_memory_clear(memory, False)
        shared = self._share_prefix(context, memory, prompts) if several else 0
        entries: list[Entry] = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= shared
        ]
        outputs = [[token] for token in self._decode(context, entries)]
        for step in range(output_len - 1):
            entries = [(out[-1], len(prompts[seq]) + step, seq, True) for seq, out in enumerate(outputs)]
            for out, token in zip(outputs, self._decode(context, entries), strict=True):
                out.append(token)
        return outputs

    def _share_prefix(self, context: Any, memory: Any, prompts: Sequence[Sequence[int]]) -> int:
        shared = min(common_prefix_len(prompts), min(map(len, prompts)) - 1)
        if shared < LEAST_SHARED:
            return 0
        self._decode(context, [(token, position, 0, False) for position, token in enumerate(prompts[0][:shared])])
        for sequence in range(1, len(prompts)):
            api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        return shared

    def _decode(self, context: Any, entries: Sequence[Entry]) -> list[int]:
        """The most likely next token after each entry that wants logits."""
        chosen = []
        batch = self._batch
        for begin in range(0, len(entries), BATCH):
            part = entries[begin : begin + BATCH]
            batch.n_tokens = len(part)
            for index, (token, position, sequence, wanted) in enumerate(part):
                batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            status = api.llama_decode(context, batch)
            assert status == 0, f"llama_decode: {status}"
            for index, entry in enumerate(part):
                if entry[3]:
                    logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, index), (self._vocab_size,))
                    chosen.append(int(logits.argmax()))
        return chosen

    def _new_context(self, sequences: int, length: int) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_batch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        context = api.llama_init_from_model(self._model, params)
        assert context, "llama.cpp made no context"
        return context
