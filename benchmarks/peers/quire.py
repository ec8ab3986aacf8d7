"""quire, as it is installed where the harness runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.peers.peer import Generate, Peer, Settings

if TYPE_CHECKING:
    from quire.config.engine import Quantization


class Quire(Peer):
    name = "quire"
    precisions = ("bf16", "int8", "int4")
    has_server = True

    @property
    def python(self) -> Path:
        return Path(sys.executable)

    def setup(self) -> None:
        """Nothing: it is installed here already."""

    def weight_bytes(self, model: Path, precision: str) -> int:
        """As packed: the checkpoint's files are of another precision."""
        from quire.config.engine import EngineConfig
        from quire.models.plan import plan_model

        config = EngineConfig(quantization=None if precision == "bf16" else cast("Quantization", precision))
        return plan_model(model, config, bandwidth=1.0, flops=1.0).weight_bytes

    def environment(self, settings: Settings) -> Mapping[str, str]:
        from quire.core.threads import SPIN_COUNT

        return {
            "GOMP_SPINCOUNT": SPIN_COUNT,  # as its commands set it for themselves
            **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
        }

    def server(self, model: Path, settings: Settings, port: int) -> list[str]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _config(settings).items()]
        return [str(self.python), "-m", "quire", "serve", str(model), "--host=127.0.0.1", f"--port={port}", *flags]

    def load(self, model: Path, settings: Settings) -> Generate:
        from quire import LLM, SamplingParams

        llm = LLM(model, **_config(settings))

        def generate(prompts: Any, output_len: int) -> list[list[int]]:
            params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
            outputs = llm.generate(prompts, params, progress=False)
            return [output.outputs[0].token_ids for output in outputs]

        return generate


def _config(settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "threads": settings.threads,
        "kv_cache_memory": settings.kv_gib,
        "max_model_len": settings.max_len,
        "max_num_seqs": settings.max_seqs,
    }
    return config if settings.precision == "bf16" else {**config, "quantization": settings.precision}
