"""The command `quire`: what each command is called and which module it lives in.

A command's module is imported when the command runs, so that `quire version` pays for nothing and `quire serve` starts
its engine before it imports a web server. A `QuireError` becomes one message on stderr: exit code 2 if what was asked
for is wrong, 1 if doing it failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quire import __version__

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = {
    "serve": ("quire.cli.serve:serve", "Serve a model behind an OpenAI-compatible API."),
    "gateway": (
        "quire.cli.gateway:gateway",
        "Put one address before many model servers: routing by prefix and load.",
    ),
    "chat": ("quire.cli.chat:chat", "Talk with a model, here in the terminal."),
    "complete": ("quire.cli.complete:complete", "Continue one prompt."),
    "plan": ("quire.cli.plan:plan", "Tell what fits in memory and how fast it can run, before reading a weight."),
    "quantize": ("quire.cli.quantize:quantize", "Write a checkpoint with weights in 8 or 4 bits."),
    "explain": ("quire.cli.explain:explain", "Tell why the gateway sent a request where it did."),
    "kernels": ("quire.cli.kernels:kernels", "List which implementation serves each op on this machine, and why."),
    "up": ("quire.cli.up:up", "Run a service on this machine: engines and the gateway in front."),
    "ps": ("quire.cli.fleet:ps", "List what runs."),
    "logs": ("quire.cli.logs:logs", "Show what a service's processes wrote."),
    "events": ("quire.cli.logs:events", "Show what happened to a service."),
    "apply": ("quire.cli.apply:apply", "Change a running service to what a manifest says, without losing a request."),
    "scale": ("quire.cli.fleet:scale", "Set the number of a service's replicas."),
    "drain": ("quire.cli.fleet:drain", "Let a replica finish what it runs, and replace it."),
    "down": ("quire.cli.fleet:down", "Stop a service."),
    "doctor": ("quire.cli.doctor:doctor", "Check the installation and the machine."),
    "version": ("quire.cli.version:version", "Print the versions of quire, Python and the main libraries."),
}
BENCHMARKS = {
    "throughput": ("quire.cli.bench.throughput:throughput", "Tokens per second of an engine without a server."),
    "latency": ("quire.cli.bench.latency:latency", "Seconds for one batch of requests without a server."),
    "serve": ("quire.cli.bench.serve:serve", "Load on an OpenAI-compatible server: TTFT, ITL, TPOT, goodput."),
    "startup": ("quire.cli.bench.startup:startup", "From the command `quire serve` to its first token."),
    "quality": ("quire.cli.bench.quality:quality", "What quantising costs: divergence from bfloat16, and accuracy."),
    "roofline": ("quire.cli.bench.roofline:roofline", "This machine's measured memory bandwidth and matmul peaks."),
}
EXIT_FAILED = 1
EXIT_WRONG = 2
EXIT_INTERRUPTED = 130


def build_app() -> App:
    from cyclopts import App, Parameter

    app = App(
        name="quire",
        help="An LLM inference engine and OpenAI-compatible server.",
        version=f"quire {__version__}",
        help_format="plaintext",
        default_parameter=Parameter(negative_iterable=(), negative_bool=()),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    bench = App(name="bench", help="Measure engines, servers and this machine.")
    for commands, parent in ((COMMANDS, app), (BENCHMARKS, bench)):
        for name, (target, summary) in commands.items():
            parent.command(target, name=name, help=summary)
    app.command(bench)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        # Before anything is imported: scripts ask for this often.
        print(f"quire {__version__}")
        return 0
    if arguments == ["version"]:
        from quire.cli.version import version

        version()
        return 0

    from quire.core.errors import QuireError
    from quire.core.threads import limit_spinning

    limit_spinning()
    try:
        result = build_app()(arguments)
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        return EXIT_WRONG if is_callers_fault(error) else EXIT_FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`quire … | head`) has what it wanted; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def is_callers_fault(error: Exception) -> bool:
    """Whether the command asked for something wrong, rather than that doing it failed."""
    from quire.core.errors import CheckpointError, ConfigError, RequestError

    return isinstance(error, (ConfigError, RequestError, CheckpointError))
