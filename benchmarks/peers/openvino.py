"""OpenVINO GenAI: optimum-intel's export with fp16, int8 or int4 weights, continuous batching with a prefix cache.

fp16 weights stand for bf16: it computes in bfloat16 where the processor can. It has no server in a Python package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.peer import TORCH, Generate, Peer, Settings, run
from benchmarks.peers.workloads import OFFLINE

VERSION = "2026.4.1.0"
WEIGHTS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}


class OpenVino(Peer):
    name = "openvino"
    precisions = ("bf16", "int8", "int4")
    workloads = tuple(workload.name for workload in OFFLINE)

    def setup(self) -> None:
        self.make_venv(TORCH)
        self.install(TORCH, f"openvino-genai=={VERSION}", "optimum-intel[openvino]", "nncf")
        # Text needs no torchvision, and one made for another torch breaks the export.
        run([str(self.python), "-m", "pip", "uninstall", "--yes", "torchvision"])

    def prepare(self, checkpoint: Path, precision: str) -> Path:
        command = [str(self.venv / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
        command += ["--task", "text-generation-with-past", "--weight-format", WEIGHTS[precision]]
        return self.converted(checkpoint, f"-{precision}", lambda path: run([*command, str(path)], HF_HUB_OFFLINE="1"))

    def load(self, model: Path, settings: Settings) -> Generate:
        import numpy as np
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(settings.kv_gib))
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = settings.max_seqs
        pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": settings.threads}
        )

        def generate(prompts: Any, output_len: int) -> list[list[int]]:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = output_len, True, False
            inputs = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
            results = pipeline.generate(inputs, [config] * len(inputs))
            return [list(result.m_generation_ids[0]) for result in results]

        return generate
