"""How results are told: JSON for programs, a table for people, a picture on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.cli.bench.statistics import Record, Summary, itls_ms, ttft_ms
from quire.core.errors import ConfigError


def print_json(result: Mapping[str, Any]) -> None:
    """Floats are rounded to what a measurement can mean."""
    print(json.dumps(_rounded(result), indent=2))


def print_table(title: str, rows: Iterable[tuple[str, str]], summaries: Mapping[str, Summary] | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # Not as the table's title, which would be folded to the table's width.
    console.print(title, style="bold", markup=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    if not summaries:
        return
    latencies = Table()
    for column in ("ms", "mean", "p50", "p90", "p99"):
        latencies.add_column(column, justify="left" if column == "ms" else "right")
    for name, summary in summaries.items():
        figures = (summary.mean, summary.p50, summary.p90, summary.p99)
        latencies.add_row(name, *("–" if value is None else f"{value:,.1f}" for value in figures))
    console.print(latencies)


def note(text: str) -> None:
    """A word about what is going on, for people: on stderr, so that stdout stays one JSON document."""
    print(text, file=sys.stderr)


def require_plotting(path: Path) -> None:
    """Raise `ConfigError` before the measurement, rather than after it, if no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed.", param="plot", remedy="pip install 'quire-llm[plot]'."
        ) from error
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}.", param="plot", remedy="Its directory does not exist.")


def plot(path: Path, title: str, records: Sequence[Record]) -> None:
    """TTFT over time, and the distributions of TTFT and ITL, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [record for record in records if record.error is None]
    begin = min((record.start for record in done), default=0.0)
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, ttfts, itls = figure.subplots(1, 3)
    over_time.scatter([record.start - begin for record in done], [ttft_ms(record) for record in done], s=8)
    over_time.set(xlabel="sent, s", ylabel="TTFT, ms", title=title)
    for axes, name, values in (
        (ttfts, "TTFT", [ttft_ms(record) for record in done]),
        (itls, "ITL", [gap for record in done for gap in itls_ms(record)]),
    ):
        axes.plot(sorted(values), [(rank + 1) / len(values) for rank in range(len(values))])
        axes.set(xlabel=f"{name}, ms", ylabel="share of values", ylim=(0, 1.02))
    figure.savefig(path, format="png", dpi=120)


def summaries_as_dict(summaries: Mapping[str, Summary]) -> dict[str, dict[str, float | int | None]]:
    return {f"{name.lower()}_ms": asdict(summary) for name, summary in summaries.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no infinity; an unlimited rate is told in words.
        return round(value, 4) if abs(value) != float("inf") else "inf"
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
