"""The events on disk: one SQLite table that is the truth, and a snapshot so that it stays bounded.

Commands and the control plane write through the same door, so a command needs no control plane to be heard, and a
control plane that is killed loses nothing that it wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from quire.core.errors import ConfigError, StorageFull
from quire.fleet.apply import apply
from quire.fleet.events import AnyEvent
from quire.fleet.state import FleetState

T = TypeVar("T")

FORMAT = 1
SNAPSHOT_EVERY = 1000
KEPT_EVENTS = 5000
"""Events kept for `quire events` once a snapshot has made them superfluous."""
BUSY_TIMEOUT = 10.0
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, body BLOB NOT NULL);
"""
_EVENT = msgspec.json.Decoder[AnyEvent](AnyEvent)
_STATE = msgspec.json.Decoder(FleetState)


class Journal:
    """The events of one service. Each method is one transaction; several processes may write.

    All raise `StorageFull` if the disk is full, and `ConfigError` if the file cannot be used for another reason.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        """Opens or makes the file, readable by its owner alone. To be `alone` with it, as long as it is open, is all
        right where a full disk has no room for what processes need to share it."""
        self._path = path
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise self._full() if error.errno == errno.ENOSPC else self._unusable(str(error.strerror)) from error
        with self._told():
            self._connection = self._open(alone)

    def _open(self, alone: bool) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            if not alone or error.sqlite_errorcode != sqlite3.SQLITE_IOERR_SHMSIZE:
                raise
        # No room for the index that processes share, and so nobody else has the file open: ours may be in memory.
        return self._connect("PRAGMA locking_mode = EXCLUSIVE")

    def _connect(self, first: str = "") -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            connection.execute(first)
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Writes nothing into a file that is prepared: what runs can be looked at and stopped on a full disk."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("PRAGMA synchronous = NORMAL")
        if version not in (0, FORMAT):
            raise self._unusable(f"its format is {version}, and this quire writes {FORMAT}")
        if version == 0:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _full(self) -> StorageFull:
        return StorageFull(
            f"There is no room for the fleet's state {self._path}.", remedy=f"Free space on the disk of {self._path}."
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", None) in _FULL
            raise self._full() if full else self._unusable(str(error)) from error

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(
            f"The fleet's state {self._path} cannot be used: {reason}.",
            remedy="Stop what runs, then remove the file, or set QUIRE_STATE_DIR to another directory.",
        )

    def append(self, *events: AnyEvent) -> None:
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO events (body) VALUES (?)", [(msgspec.json.encode(event),) for event in events]
            )

    def load(self) -> tuple[int, FleetState]:
        """The number of the last event, and the state after it."""
        with self._transaction("DEFERRED"):
            row = self._connection.execute("SELECT seq, body FROM snapshot").fetchone()
            seq, state = (0, FleetState()) if row is None else (row[0], self._decode(_STATE, row[1]))
            for number, event in self._after(seq):
                seq, state = number, apply(state, event)
        return seq, state

    def after(self, seq: int) -> list[tuple[int, AnyEvent]]:
        """The events after number `seq`, with their numbers."""
        return self._after(seq)

    def last(self, count: int) -> list[tuple[int, AnyEvent]]:
        with self._told():
            query = "SELECT seq, body FROM events ORDER BY seq DESC LIMIT ?"
            rows = self._connection.execute(query, (count,)).fetchall()
        return [(seq, self._decode(_EVENT, body)) for seq, body in reversed(rows)]

    def compact(self, seq: int, state: FleetState) -> None:
        """Keep `state`, which is that after event `seq`, and forget the events that are older than needed."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO snapshot (id, seq, body) VALUES (1, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET seq = excluded.seq, body = excluded.body",
                (seq, msgspec.json.encode(state)),
            )
            self._connection.execute("DELETE FROM events WHERE seq <= ?", (seq - KEPT_EVENTS,))

    def _after(self, seq: int) -> list[tuple[int, AnyEvent]]:
        with self._told():
            query = "SELECT seq, body FROM events WHERE seq > ? ORDER BY seq"
            rows = self._connection.execute(query, (seq,)).fetchall()
        return [(number, self._decode(_EVENT, body)) for number, body in rows]

    def _decode(self, decoder: msgspec.json.Decoder[T], body: bytes) -> T:
        try:
            return decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise self._unusable(str(error)) from error

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        with self._told():
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
