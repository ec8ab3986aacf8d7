"""Where a service's state is on disk, and the lock that lets one control plane have it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from pathlib import Path

from quire.core.errors import ConfigError, NotFound

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?")
"""A DNS label, as Kubernetes asks for; short enough for what is appended."""
LOCK_ATTEMPTS, LOCK_PAUSE = 20, 0.05


def state_root(setting: str | None) -> Path:
    """`setting` (QUIRE_STATE_DIR), or `quire` in the user's XDG state directory."""
    if setting is not None:
        return Path(setting).expanduser().absolute()
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser().absolute() / "quire"


def check_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            f"The service's name is {name[:80]!r}.",
            param="metadata.name",
            remedy="It must be at most 50 lower-case letters, digits and '-', and begin and end with none of the last.",
        )
    return name


def services(root: Path) -> list[str]:
    """The names of the services that have a state here."""
    if not root.is_dir():
        return []
    # `os.path`: what is another user's is none of ours, and no error.
    return sorted(
        name for name in os.listdir(root) if NAME.fullmatch(name) and os.path.isfile(root / name / "fleet.db")
    )


class ServiceDirectory:
    """The files of one service."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = check_name(name)
        self.path = root / name
        self.database = self.path / "fleet.db"
        self.endpoints_file = self.path / "endpoints.yaml"
        self.control_log = self.path / "logs" / "control.log"

    def make(self) -> None:
        """For its owner alone: what a manifest says, secrets included, is in here."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)  # one that was made before
            self.control_log.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be made: {error.strerror}.", remedy="Set QUIRE_STATE_DIR to another directory."
            ) from error

    def check_exists(self) -> None:
        if not self.database.is_file():
            raise NotFound(f"There is no service {self.name!r}.", remedy="`quire ps` lists them.")


def write_file(path: Path, content: bytes) -> None:
    """In one step, so that a reader never sees half of it, and readable by its owner alone."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # its mode would be kept
    with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
    os.replace(part, path)


class ControlLock:
    """Held by the one control plane of a service; the kernel lets go of it however that ends."""

    def __init__(self, directory: ServiceDirectory) -> None:
        self._path = directory.path / "control.lock"
        self._name = directory.name
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises `ConfigError` if another control plane has it."""
        for _ in range(LOCK_ATTEMPTS):  # `holder` takes it for a moment
            if self._try():
                assert self._fd is not None
                with contextlib.suppress(OSError):  # a full disk: the number is for people, the lock is the kernel's
                    os.ftruncate(self._fd, os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0))
                return
            time.sleep(LOCK_PAUSE)
        raise ConfigError(
            f"{self._name} runs already (control plane {self._read()}).",
            param="name",
            remedy="`quire apply FILE` changes it, `quire down` stops it.",
        )

    def holder(self) -> int | None:
        """The process that has it; None if nobody does."""
        if not self._path.exists():
            return None
        if self._try():
            self.release()
            return None
        return self._read()

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _try(self) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def _read(self) -> int:
        try:
            return int(self._path.read_text())
        except ValueError:
            return 0
