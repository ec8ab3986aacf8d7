"""The checks of `quire doctor`: each looks at one thing and says what it found and what to do."""

from __future__ import annotations

import errno
import math
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Literal

from quire.core.errors import QuireError

GIB = 1024**3
LEAST_MEMORY = 2 * GIB
LEAST_DISK = 5 * GIB
DISTRIBUTION = "quire-llm"
QUESTION = "What is 17 + 25?"
ANSWER = "42"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str | None = None


def run_checks(host: str, port: int, *, ask_model: bool) -> list[Check]:
    """All of them, in order. One that breaks is one that fails: the others are still made."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("torch", check_torch),
        ("cores", check_cores),
        ("memory", check_memory),
        ("disk", check_disk),
        ("port", lambda: check_port(host, port)),
        ("shared libraries", check_libraries),
        ("kernels", check_kernels),
    ]
    if ask_model:
        checks.append(("model", check_model))
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except QuireError as error:
            found.append(Check(name=name, status="fail", detail=error.message, remedy=error.remedy))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            found.append(Check(name=name, status="fail", detail=message, remedy="Install quire again, or report this."))
    return found


def check_python() -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036 - a doctor does not trust the installer
        return Check(name="python", status="fail", detail=detail, remedy="quire needs Python 3.11 or newer.")
    return Check(name="python", status="ok", detail=detail)


def check_packages() -> Check:
    """That every library which the package asks for is there."""
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return Check(
            name="packages",
            status="warn",
            detail=f"{DISTRIBUTION} is not installed as a package.",
            remedy="Run it with pip install, so that its dependencies come along.",
        )
    missing = []
    for requirement in wanted:
        if ";" in requirement and "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            installed_version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check(
            name="packages",
            status="fail",
            detail=f"Not installed: {', '.join(missing)}.",
            remedy=f"pip install {' '.join(missing)}",
        )
    return Check(name="packages", status="ok", detail="All dependencies are installed.")


def check_torch() -> Check:
    import torch

    detail = (
        f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return Check(
            name="torch",
            status="warn",
            detail=detail,
            remedy="This CPU offers torch no vector instructions (AVX2, AVX-512, NEON): it will be slow.",
        )
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Check(
            name="torch", status="warn", detail=detail, remedy="This torch has no oneDNN: bfloat16 will be slow."
        )
    return Check(name="torch", status="ok", detail=detail)


def check_cores() -> Check:
    """Cores that we may use: what there is, less the affinity mask, less the cgroup's share of time."""
    there, ours = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = cgroup_cpus(Path("/sys/fs/cgroup/cpu.max"))
    detail = f"{ours} of {there} cores" + (f", {quota:g} cores' worth of time" if quota is not None else "")
    if quota is not None and quota < ours:
        threads = max(1, math.floor(quota))
        return Check(
            name="cores",
            status="warn",
            detail=detail,
            remedy=f"The container gets less time than it has cores: use --threads {threads}.",
        )
    if ours < 2:
        return Check(
            name="cores", status="warn", detail=detail, remedy="The server and the engine will share one core."
        )
    return Check(name="cores", status="ok", detail=detail)


def check_memory() -> Check:
    """What the engine would find: the machine's free memory, or what the container's limit leaves of it."""
    import psutil

    from quire.cache.ledger import available_memory

    free, total = available_memory(), psutil.virtual_memory().total
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB may be used"
    if free < LEAST_MEMORY:
        return Check(
            name="memory",
            status="warn",
            detail=detail,
            remedy="Enough for the built-in model; `quire plan MODEL` tells what a larger one needs.",
        )
    return Check(name="memory", status="ok", detail=detail)


def check_disk() -> Check:
    """Room where models are downloaded to, and a place for the engine's socket."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache")
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    detail = f"{free / GIB:.1f} GiB free at {cache}"
    if not os.access(cache, os.W_OK):
        return Check(
            name="disk", status="warn", detail=f"{cache} cannot be written.", remedy="Set --download-dir or HF_HOME."
        )
    with tempfile.NamedTemporaryFile():
        pass  # raises if there is no temporary directory that can be written
    if free < LEAST_DISK:
        return Check(
            name="disk", status="warn", detail=detail, remedy="Downloads of models may not fit: set --download-dir."
        )
    return Check(name="disk", status="ok", detail=detail)


def check_port(host: str, port: int) -> Check:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # As servers do, so that a port which only waits for its last connections to end counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            detail = f"{host}:{port} is taken." if taken else f"{host}:{port}: {error.strerror}."
            return Check(name="port", status="warn", detail=detail, remedy="Choose another one with --port.")
    return Check(name="port", status="ok", detail=f"{host}:{port} is free")


def check_libraries() -> Check:
    """One OpenMP runtime: two of them in a process fight over the cores."""
    import torch  # noqa: F401 - brings its libraries with it

    maps = Path("/proc/self/maps")
    if not maps.exists():
        return Check(name="shared libraries", status="ok", detail="Not known on this system.")
    runtimes = {
        Path(line.split(maxsplit=5)[5]).resolve()
        for line in maps.read_text().splitlines()
        if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", line)
    }
    names = ", ".join(sorted(path.name for path in runtimes)) or "none"
    if len(runtimes) > 1:
        return Check(
            name="shared libraries",
            status="warn",
            detail=f"Several OpenMP runtimes are loaded: {names}.",
            remedy="Look at LD_PRELOAD, and at what else is installed in this environment.",
        )
    return Check(name="shared libraries", status="ok", detail=f"torch loads; OpenMP runtime: {names}")


def check_kernels() -> Check:
    import torch

    from quire.ops.kernels import select
    from quire.ops.target import Target

    report = select(Target("cpu", torch.bfloat16)).report()
    backends = sorted({implementation for _, implementation, _ in report})
    return Check(name="kernels", status="ok", detail=f"{len(report)} ops served by {', '.join(backends)}")


def check_model() -> Check:
    """The whole way once: load the built-in model, ask it, read the answer."""
    from quire.config.engine import BUILTIN_MODEL
    from quire.core.sampling import SamplingParams
    from quire.engine.llm import LLM

    llm = LLM(BUILTIN_MODEL, max_num_seqs=1, kv_cache_memory=0.0625)
    messages = [{"role": "user", "content": QUESTION}]
    answer = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=32), progress=False)[0].outputs[0].text
    detail = f"{BUILTIN_MODEL}: {QUESTION} {answer.strip()}"
    if ANSWER not in answer:
        return Check(
            name="model", status="fail", detail=detail, remedy=f"It should say {ANSWER}: this machine computes wrongly."
        )
    return Check(name="model", status="ok", detail=detail)


def cgroup_cpus(path: Path) -> float | None:
    """Cores' worth of time by cgroup v2's `cpu.max` (quota and period in µs); None for no limit."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdecimal() else None
