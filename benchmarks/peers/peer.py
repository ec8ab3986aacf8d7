"""What the harness knows of an engine. Standard library only: a subclass's `load` runs in the engine's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""(prompts as token ids, new tokens of each) → the new token ids: greedily, whatever EOS says, all at once."""

TORCH = "torch==2.13.0"
"""Pinned, and installed before anything else, where a peer needs torch: a newer one may bring GBs of CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all engines are given alike."""

    precision: str
    """bf16, int8 or int4: of weights. Each engine's own arithmetic behind it is in its file."""
    threads: int
    kv_gib: float = 4.0
    max_len: int = 4096
    max_seqs: int = 64


class Peer:
    """One engine. Defaults suit one that reads the checkpoint as it is and needs nothing from its environment."""

    name: str
    precisions: tuple[str, ...] = ("bf16",)
    workloads: tuple[str, ...] | None = None
    """Names of those it can do; all if None (those that need a server only if it has one)."""
    has_server = False

    def __init__(self, home: Path) -> None:
        self.home = home / self.name

    @property
    def venv(self) -> Path:
        return self.home / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def setup(self) -> None:
        """Make its environment under `home`. May be run again after it failed."""
        raise NotImplementedError

    def prepare(self, checkpoint: Path, precision: str) -> Path:
        """The model as the engine wants it: converted, once, under `home`, or the checkpoint itself."""
        return checkpoint

    def weight_bytes(self, model: Path, precision: str) -> int:
        """What the weights of `prepare`'s model take once they are loaded: as much as in its files."""
        files = [model] if model.is_file() else [*model.glob("*.safetensors"), *model.glob("*.bin")]
        return sum(file.stat().st_size for file in files)

    def environment(self, settings: Settings) -> Mapping[str, str]:
        """Variables that it runs best with."""
        return {}

    def server(self, model: Path, settings: Settings, port: int) -> list[str]:
        """The command of its server with OpenAI's API."""
        raise NotImplementedError

    def load(self, model: Path, settings: Settings) -> Generate:
        """In the engine's own environment: load the model."""
        raise NotImplementedError

    def make_venv(self, *requirements: str) -> None:
        if not self.python.exists():
            run([sys.executable, "-m", "venv", str(self.venv)])
        self.install(*requirements)

    def install(self, *arguments: str) -> None:
        run([str(self.python), "-m", "pip", "install", *arguments])

    def converted(self, checkpoint: Path, suffix: str, convert: Callable[[Path], None]) -> Path:
        """A conversion that is made once and kept, by the name of the checkpoint's directory."""
        path = self.home / "models" / f"{checkpoint.resolve().name}{suffix}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"unfinished-{path.name}")
            convert(unfinished)
            unfinished.rename(path)
        return path


def run(command: Sequence[str], **environment: str) -> None:
    """In an environment without ours: a PYTHONPATH of the harness is none of a peer's business."""
    print("+", " ".join(command), file=sys.stderr)
    subprocess.run(command, check=True, env=clean_environment() | environment)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
