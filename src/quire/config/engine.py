"""What decides how an engine runs. Names follow vLLM's flags where the meaning is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KVCacheDType = Literal["auto", "bf16", "int8", "fp8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Policy = Literal["fcfs", "priority", "fair"]
Quantization = Literal["int8", "int4", "fp8", "fp8_dynamic"]
Isa = Literal["amx", "avx512_bf16", "avx512", "avx2", "portable", "reference", "triton"]
RunnerKind = Literal["auto", "generate", "pooling"]
PoolingMethod = Literal["cls", "last", "mean"]
ModelImpl = Literal["auto", "quire", "transformers"]
SwapMode = Literal["auto", "recompute", "swap"]

BUILTIN_MODEL = "quire-tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine. Every field is a flag (`max_model_len` is `--max-model-len`)."""

    model: str = BUILTIN_MODEL
    """A local directory, a Hugging Face id, an s3:// URL, or the built-in model's name."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    hf_token: str | None = None
    """Token for gated repositories; the environment's HF_TOKEN otherwise."""
    download_dir: str | None = None
    """Where downloads are kept; the Hugging Face cache otherwise."""
    tokenizer: str | None = None
    """Directory or id of another tokenizer than the model's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template to use instead of the checkpoint's."""
    runner: RunnerKind = "auto"
    """What the model is for: pooling gives vectors of one that generates, too; auto goes by its name and files."""
    pooling_method: PoolingMethod | None = None
    """Which tokens an embedding is made of: the first, the last or all; as the checkpoint says otherwise."""
    classifier_tokens: str | None = None
    """Two tokens, such as no,yes: texts are judged by how much likelier the second is to come next than the first."""
    device: str = "auto"
    """What computes: cpu, cuda, cuda:1, xpu; auto takes the first GPU that torch can use, or else the CPU."""
    dtype: DType = "auto"
    """Of weights and activations; auto takes the checkpoint's (float16 becomes bfloat16 on a CPU)."""
    model_impl: ModelImpl = "auto"
    """Whose code runs the model: quire's, or that of transformers with quire's attention and cache; auto takes quire's
    for architectures that it has."""
    quantization: Quantization | None = None
    """Round the weights of linear layers to this format while they load; a quantised checkpoint needs no flag.
    fp8_dynamic, on a GPU, rounds each token's activations as well, of FP8 checkpoints too."""
    packed_weights_cache: str | None = None
    """Directory that keeps the weights as the CPU kernels have them, for the next start; nothing is kept otherwise."""
    packed_weights_cache_size: float = 64.0
    """Most GiB in packed_weights_cache; the files that were not used for longest go."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; the model's own limit otherwise, or less if memory holds less."""
    block_size: int = 32
    """Tokens per KV block. CPU kernels use blocks of 32 and more in place; smaller ones they put together first."""
    kv_cache_dtype: KVCacheDType = "auto"
    """Of keys and values in the cache; auto takes dtype, int8 and fp8 keep one float32 scale per token and head."""
    kv_cache_memory: float | None = None
    """Bytes for the KV pool in GiB; otherwise a share of what memory is left, see memory_utilization."""
    num_kv_blocks: int | None = None
    """Blocks of the KV pool, instead of what memory holds; for experiments."""
    memory_utilization: float | None = None
    """Share of the memory that is free after the weights that the KV pool may take, if kv_cache_memory is not set; 0.5
    if not set, on a GPU 0.9."""
    swap_space: float = 0.0
    """GiB of host memory for KV of preempted requests."""
    preemption: SwapMode = "auto"
    """How a preempted request comes back: by computing again, from swap space, or whichever is cheaper."""
    enable_prefix_caching: bool = True
    """Reuse KV blocks of equal prefixes."""
    kv_events_config: str | None = None
    """JSON object with vLLM's keys: where to publish what is in the prefix cache, for routers; off if not set."""
    async_scheduling: bool | None = None
    """Launch a step before the tokens of the one before have been read; unset: on GPUs."""
    enforce_eager: bool = False
    """No CUDA graphs: decode steps are launched kernel by kernel."""
    max_num_seqs: int | None = None
    """Most requests that run at once; 64 if not set, on a GPU 256."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, 1024 if not set, on a GPU 8192; a longer prompt is computed in chunks, or by an encoder
    whole, in a longer step."""
    scheduling_policy: Policy | None = None
    """fcfs, priority or fair; unset is fcfs until a request names a tenant, then fair."""
    max_num_queued_reqs: int = 1024
    """Most requests that wait; one more is refused with 429."""
    max_num_queued_tokens: int = 4_000_000
    """Most prompt tokens that wait."""
    max_logprobs: int = 20
    """Most alternatives a request may ask for with logprobs or prompt_logprobs."""
    threads: int | None = None
    """CPU threads of the engine; one per core it may use otherwise."""
    isa: Isa | None = None
    """Instruction set of the CPU kernels, or reference for torch alone; the best that runs here otherwise. triton
    checks the GPU's kernels without one, with TRITON_INTERPRET=1 in the environment: very slow."""
    seed: int = 0
    """Seeds the choice of seeds for requests that name none."""
