"""llama.cpp, built for this machine from the sources in llama-cpp-python's sdist, which binds to that build.

bf16, Q8_0 and Q4_0 stand for bf16, int8 and int4. The worker decodes through llama-cpp-python's low-level API, several
sequences in one batch, a shared prefix computed once; the server is `llama-server`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.peer import TORCH, Generate, Peer, Settings, run
from benchmarks.peers.workloads import OFFLINE, ONLINE

VERSION = "0.3.36"
SOURCES = f"llama_cpp_python-{VERSION}"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-server", "llama-quantize")
CMAKE_FLAGS = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF",
               "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
               )  # fmt: skip
QUANTISED = {"int8": "Q8_0", "int4": "Q4_0"}

# GCC believes that the intrinsic reads eight bytes and drops the stores to the rest, so the kernels trap: tell it.
KEEP_TILE_CONFIG = ("    _tile_loadconfig(&tc);", '    __asm__ volatile("" : : "m"(tc));\n    _tile_loadconfig(&tc);')

# The converter knows tokenizers by a fingerprint and refuses others. Ids are all we send, so any will do.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_module("convert_hf_to_gguf", run_name="__main__")
"""


class LlamaCpp(Peer):
    name = "llama.cpp"
    precisions = ("bf16", "int8", "int4")
    has_server = True

    @property
    def sources(self) -> Path:
        return self.home / SOURCES / "vendor" / "llama.cpp"

    @property
    def binaries(self) -> Path:
        return self.home / "build" / "bin"

    def setup(self) -> None:
        self.make_venv(TORCH)
        self.install(TORCH, "transformers", "sentencepiece", "scikit-build-core", "cmake", "ninja")
        download = ["download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", f"--dest={self.home}"]
        path = f"{self.venv / 'bin'}:{os.environ['PATH']}"
        run([str(self.python), "-m", "pip", *download, f"llama-cpp-python=={VERSION}"], PATH=path)
        run(["tar", "-xzf", str(self.home / f"{SOURCES}.tar.gz"), "-C", str(self.home)])
        amx = self.sources / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
        amx.write_text(amx.read_text().replace(*KEEP_TILE_CONFIG))
        build = str(self.home / "build")
        flags = [f"-D{flag}" for flag in CMAKE_FLAGS]
        run(["cmake", "-G", "Ninja", "-S", str(self.sources), "-B", build, *flags], PATH=path)
        run(["cmake", "--build", build, "--target", *TOOLS], PATH=path)
        run([str(self.python), "-m", "pip", "install", str(self.home / SOURCES)], CMAKE_ARGS="-DLLAMA_BUILD=OFF")

    def prepare(self, checkpoint: Path, precision: str) -> Path:
        script = [str(self.python), "-c", CONVERT, str(self.sources), str(checkpoint), "--outtype", "bf16"]
        bf16 = self.converted(checkpoint, "-bf16.gguf", lambda path: run([*script, "--outfile", str(path)]))
        if precision == "bf16":
            return bf16
        quantise = [str(self.binaries / "llama-quantize"), str(bf16)]
        suffix = f"-{precision}.gguf"
        return self.converted(checkpoint, suffix, lambda path: run([*quantise, str(path), QUANTISED[precision]]))

    def environment(self, settings: Settings) -> Mapping[str, str]:
        return {"LLAMA_CPP_LIB_PATH": str(self.binaries)}

    def server(self, model: Path, settings: Settings, port: int) -> list[str]:
        longest = max(workload.prompt_len + workload.output_len for workload in ONLINE)
        context = settings.max_seqs * -(-(longest + 1) // 256) * 256
        flags = {"--threads": settings.threads, "--parallel": settings.max_seqs, "--ctx-size": context}
        options = [str(word) for pair in flags.items() for word in pair]
        return [str(self.binaries / "llama-server"), "--model", str(model), "--port", str(port), *options]

    def own_benchmarks(self, model: Path, threads: int, turns: int) -> None:
        """llama.cpp's word on W1, W2 and W3, to check the worker's figures against."""
        common = ["--model", str(model), "--threads", str(threads)]
        depth = ["--n-prompt", "2048", "--n-gen", "128", "--repetitions", str(turns)]
        run([str(self.binaries / "llama-bench"), *common, *depth])
        many = ["-c", "10240", "-npp", "256", "-ntg", "64", "-npl", "32"]
        run([str(self.binaries / "llama-batched-bench"), *common, *many])

    def load(self, model: Path, settings: Settings) -> Generate:
        from benchmarks.peers.llama_decoder import Decoder

        many = [workload for workload in OFFLINE if workload.num_prompts > 1]
        return Decoder(
            model,
            threads=settings.threads,
            longest=settings.max_len,
            most=max(workload.num_prompts for workload in many),
            longest_of_many=max(workload.prompt_len + workload.output_len for workload in many),
        )
