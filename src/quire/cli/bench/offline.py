"""What `bench throughput` and `bench latency` share: the workload's flags, and an engine of our own to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from quire.cli.bench.workload import BenchRequest, Kind, Workload
from quire.config.engine import EngineConfig
from quire.core.sampling import SamplingParams

if TYPE_CHECKING:
    from quire.engine.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """Flags of the benchmarks without a server."""

    workload: Kind = "random"
    """random, or shared-prefix: prompts that begin alike."""
    input_len: int = 256
    """Tokens of a prompt, without its shared prefix."""
    output_len: int = 64
    """Tokens to generate."""
    random_range_ratio: float = 0.0
    """Lengths vary evenly between n(1-r) and n(1+r)."""
    prefix_len: int = 0
    """Tokens of a shared prefix."""
    num_prefixes: int = 1
    """Different shared prefixes."""
    seed: int = 0
    """Of the prompts."""
    json: bool = False
    """Print JSON."""

    def make_workload(self, num_prompts: int, vocab_size: int) -> Workload:
        return Workload(
            kind=self.workload,
            num_prompts=num_prompts,
            input_len=self.input_len,
            output_len=self.output_len,
            range_ratio=self.random_range_ratio,
            prefix_len=self.prefix_len,
            num_prefixes=self.num_prefixes,
            vocab_size=vocab_size,
            seed=self.seed,
        )


OfflineFlags = Annotated[OfflineOptions, Parameter(name="*")]
DEFAULTS = OfflineOptions()


def asked_for(options: OfflineOptions) -> dict[str, Any]:
    """The workload, for the record."""
    return {name: value for name, value in asdict(options).items() if name != "json"}


def load_engine(config: EngineConfig) -> LLM:
    from quire.engine.llm import LLM

    return LLM(**asdict(config))


def run_batch(llm: LLM, requests: Sequence[BenchRequest], *, progress: bool) -> tuple[int, int]:
    """Generate greedily, all tokens that are asked for; returns how many prompt and output tokens there were."""
    prompts = [request.prompt for request in requests]
    assert all(isinstance(prompt, list) for prompt in prompts)
    params = [
        SamplingParams(temperature=0.0, max_tokens=request.output_len, ignore_eos=True, detokenize=False)
        for request in requests
    ]
    outputs = llm.generate(prompts, params, progress=progress)  # type: ignore[arg-type]
    output_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return sum(len(output.prompt_token_ids) for output in outputs), output_tokens
