"""The flags of every command, pinned: a change of this list is a change of what users type."""

from __future__ import annotations

from dataclasses import fields

import pytest

from quire.cli.flags import as_arguments, field_docs, settings
from quire.cli.main import BENCHMARKS, COMMANDS, build_app
from quire.config.engine import EngineConfig
from quire.config.resolve import flag_name
from quire.config.server import ServerConfig

SEED = {"--seed"}
ENGINE = {
    "--revision",
    "--hf-token",
    "--download-dir",
    "--tokenizer",
    "--chat-template",
    "--runner",
    "--pooling-method",
    "--classifier-tokens",
    "--device",
    "--async-scheduling",
    "--no-async-scheduling",
    "--enforce-eager",
    "--no-enforce-eager",
    "--dtype",
    "--quantization",
    "--model-impl",
    "--packed-weights-cache",
    "--packed-weights-cache-size",
    "--max-model-len",
    "--block-size",
    "--kv-cache-dtype",
    "--kv-cache-memory",
    "--num-kv-blocks",
    "--memory-utilization",
    "--swap-space",
    "--preemption",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--kv-events-config",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--scheduling-policy",
    "--max-num-queued-reqs",
    "--max-num-queued-tokens",
    "--max-logprobs",
    "--isa",
    "--threads",
}
LISTEN = {
    "--host",
    "--port",
    "--api-key",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--max-body-bytes",
    "--max-connections",
    "--request-read-timeout",
    "--shutdown-timeout",
    "--log-level",
    "--log-json",
    "--no-log-json",
}
SERVER = LISTEN | {
    "--served-model-name",
    "--heartbeat-timeout",
    "--max-engine-restarts",
    "--generation-config",
    "--no-generation-config",
}
GATEWAY = LISTEN | {
    "--endpoints",
    "--endpoints-file",
    "--endpoints-dns",
    "--policy",
    "--exact-tokens",
    "--no-exact-tokens",
    "--scrape-interval",
    "--health-interval",
    "--connect-timeout",
    "--first-byte-timeout",
    "--idle-timeout",
    "--max-retries",
    "--extproc-port",
    "--extproc-max-streams",
    "--trust-subset-header",
    "--no-trust-subset-header",
    "--hedge-delay",
    "--explain-requests",
}
SAMPLING = {
    "--max-tokens",
    "--temperature",
    "--top-p",
    "--top-k",
    "--min-p",
    "--repetition-penalty",
    "--seed",
    "--stop",
}
MODEL = {"--model", "--config"}
REMOTE = {"--url", "--api-key"}
PROMPTS = {
    "--workload",
    "--input-len",
    "--output-len",
    "--random-range-ratio",
    "--prefix-len",
    "--num-prefixes",
    "--seed",
    "--json",
}
FLAGS = {
    "serve": MODEL | ENGINE | SEED | SERVER,
    "gateway": GATEWAY | {"--config"},
    "explain": REMOTE | {"--request-id", "--json"},
    "chat": MODEL | REMOTE | SAMPLING | ENGINE | {"--system"},
    "complete": MODEL | REMOTE | SAMPLING | ENGINE,
    "plan": MODEL | ENGINE | SEED | {"--json", "--memory", "--bandwidth", "--tflops"},
    "quantize": {
        "--format",
        "--group-size",
        "--method",
        "--calibration",
        "--calibration-tokens",
        "--threads",
        "--config",
    },
    "kernels": {"--dtype", "--device", "--isa", "--json"},
    "up": {
        "--manifest",
        "--resume",
        "--detach",
        "--gateway",
        "--no-gateway",
        "--state-dir",
        "--pvc-dir",
        "--provider",
        "--host",
        "--port",
    },
    "ps": {"--json", "--state-dir"},
    "logs": {"--name", "--follow", "-f", "--lines", "-n", "--state-dir"},
    "events": {"--name", "--follow", "-f", "--lines", "-n", "--state-dir"},
    "apply": {"--manifest", "--dry-run", "--wait", "--no-wait", "--state-dir", "--pvc-dir"},
    "scale": {"--name", "--replicas", "--role", "--wait", "--no-wait", "--state-dir"},
    "drain": {"--replica", "--timeout", "--wait", "--no-wait", "--state-dir"},
    "down": {"--name", "--now", "--state-dir"},
    "doctor": {"--host", "--port", "--model", "--no-model", "--gateway", "--api-key", "--config", "--json"},
    "version": {"--json"},
    "bench throughput": MODEL | ENGINE | PROMPTS | {"--num-prompts", "--backend"},
    "bench latency": MODEL | ENGINE | PROMPTS | {"--batch-size", "--num-iters", "--num-warmup-iters"},
    "bench startup": MODEL | ENGINE | SEED | {"--repeat", "--start-timeout", "--json"},
    "bench quality": MODEL
    | ENGINE
    | SEED
    | {"--against", "--text", "--max-text-tokens", "--questions-per-skill", "--json"},
    "bench roofline": {"--device", "--threads", "--seconds", "--matmul-size", "--json"},
    "bench serve": PROMPTS
    | REMOTE
    | {
        "--model",
        "--endpoint",
        "--num-prompts",
        "--request-rate",
        "--burstiness",
        "--max-concurrency",
        "--prompt-format",
        "--vocab-size",
        "--temperature",
        "--ignore-eos",
        "--no-ignore-eos",
        "--warmup",
        "--slo",
        "--plot",
    },
}


def flags_of_command(*names: str) -> set[str]:
    root = app = build_app()
    for name in names:
        app = app[name]
    arguments = app.assemble_argument_collection(default_parameter=root.default_parameter)
    return {flag for argument in arguments for flag in argument.names if flag.startswith("-")}


def test_every_command_is_pinned():
    assert set(FLAGS) == set(COMMANDS) | {f"bench {name}" for name in BENCHMARKS}


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_the_flags_of_a_command_are_those_that_are_pinned(command):
    found = flags_of_command(*command.split())
    assert found == FLAGS[command], f"new: {found - FLAGS[command]}, gone: {FLAGS[command] - found}"


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_field_is_documented_and_a_flag_of_serve(cls):
    docs = field_docs(cls)
    flags = flags_of_command("serve")
    for field in fields(cls):
        assert docs[field.name].endswith(".")
        assert flag_name(field.name) in flags


@pytest.mark.parametrize("command", [["serve"], ["bench", "throughput"], ["bench", "startup"], ["chat"]])
def test_parsed_flags_come_back_as_the_arguments_they_were(command):
    given = ["--block-size=32", "--no-enable-prefix-caching", "--kv-cache-memory=0.5", "--dtype=float32"]
    _, bound, _ = build_app().parse_args([*command, "quire-tiny", *given])
    flags = bound.arguments["engine"]
    assert as_arguments(flags) == sorted(given, key=lambda text: as_arguments(flags).index(text))
    resolved = settings(EngineConfig, flags, config=None, model=bound.arguments["model"])
    expected = EngineConfig(block_size=32, enable_prefix_caching=False, kv_cache_memory=0.5, dtype="float32")
    assert resolved.value == expected
    assert {name for name, source in resolved.sources.items() if source == "flag"} == {"model", *flags}


def test_a_negative_number_is_a_value_not_a_flag():
    _, bound, _ = build_app().parse_args(["serve", "--seed", "-5"])
    assert bound.arguments["engine"] == {"seed": "-5"}
