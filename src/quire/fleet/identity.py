"""Which process is meant: a number is given again, a number together with its time of start is not."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_STARTTIME = 19
"""Index of `starttime` (field 22 of proc_pid_stat(5)) among the fields that follow the command's name."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A process of this machine. `start_ticks` counts from the boot that `boot_id` names."""

    pid: int
    start_ticks: int
    boot_id: str


def identify(pid: int) -> Identity | None:
    """None if there is no such process, or only what is left of it until its parent has looked."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    if fields[0] in "ZX":
        return None
    return Identity(pid=pid, start_ticks=int(fields[_STARTTIME]), boot_id=boot_id)


def is_running(identity: Identity) -> bool:
    return identify(identity.pid) == identity


def send_signal(identity: Identity, number: int) -> None:
    """To that very process, and to no other that has its number by now. Nothing happens if it has ended."""
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        if is_running(identity):
            import signal

            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
