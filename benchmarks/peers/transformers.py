"""transformers: `generate` on a static batch, in bfloat16. W4 it sits out: it would compute the prefix 32 times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.peer import TORCH, Generate, Peer, Settings


class Transformers(Peer):
    name = "transformers"
    workloads = ("W1", "W2", "W3")

    def setup(self) -> None:
        self.make_venv(TORCH)
        self.install(TORCH, "transformers>=5")

    def load(self, model: Path, settings: Settings) -> Generate:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(settings.threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True).eval()

        def generate(prompts: Any, output_len: int) -> list[list[int]]:
            batch = torch.tensor(prompts)
            with torch.inference_mode():
                out = loaded.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    do_sample=False,
                    min_new_tokens=output_len,
                    max_new_tokens=output_len,
                    pad_token_id=0,
                )
            return out[:, batch.shape[1] :].tolist()

        return generate
