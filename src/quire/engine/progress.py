"""A progress bar for the Python API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that is told how many requests have finished and how many tokens there are so far."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
        transient=False,
    ) as progress:
        task = progress.add_task(title, total=total, tokens=0, rate=0.0)

        def tell(finished: int, tokens: int) -> None:
            elapsed = progress.tasks[0].elapsed or 0.0
            progress.update(task, completed=finished, tokens=tokens, rate=tokens / elapsed if elapsed else 0.0)

        yield tell
