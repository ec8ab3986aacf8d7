"""What was found, as tables: medians of the turns, beside the least that the machine's limits allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.counts import Counts, Limits
from benchmarks.gpu.workloads import Work


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure that could be measured. `least`: seconds by the roofline. `tokens`: made, or read in a prefill."""

    name: str
    least: float
    tokens: int
    bound: str


def lines(
    counts: Counts,
    limits: Limits,
    *,
    batches: Sequence[int],
    prefills: Sequence[int],
    context: int,
    nano: Work | None,
) -> list[Line]:
    """The figures of `workloads.measure`, by the names that it gives them."""
    found = []
    for batch in batches:
        cost = counts.decode(batch, context)
        found.append(Line(name=f"decode {batch}", least=cost.seconds(limits), tokens=batch, bound=cost.bound(limits)))
    for length in prefills:
        cost = counts.prefill([length])
        found.append(
            Line(name=f"prefill {length}", least=cost.seconds(limits), tokens=length, bound=cost.bound(limits))
        )
    if nano is not None:
        least = counts.whole([len(prompt) for prompt in nano.prompts], nano.output_lens, limits)
        found.append(Line(name="nano", least=least, tokens=sum(nano.output_lens), bound="memory"))
    return found


def medians(turns: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Of those turns that have the figure."""
    values = [turn["seconds"][name] for turn in turns if name in turn["seconds"]]
    return statistics.median(values) if values else None


def rows(wanted: Sequence[Line], turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each figure: the roofline, and for each engine its median, rate and share of the roofline."""
    found = []
    for line in wanted:
        row: dict[str, Any] = {
            "figure": line.name,
            "bound": line.bound,
            "roofline_ms": line.least * 1e3,
            "roofline_tokens_per_s": line.tokens / line.least,
            "engines": {},
        }
        for engine, taken in turns.items():
            seconds = medians(taken, line.name)
            if seconds is not None:
                all_of_them = [turn["seconds"][line.name] * 1e3 for turn in taken if line.name in turn["seconds"]]
                row["engines"][engine] = {
                    "ms": seconds * 1e3,
                    "least_ms": min(all_of_them),
                    "most_ms": max(all_of_them),
                    "tokens_per_s": line.tokens / seconds,
                    "share_of_roofline": line.least / seconds,
                }
        found.append(row)
    return found


def table(found: Sequence[Mapping[str, Any]], engines: Sequence[str]) -> str:
    """In Markdown. Beside quire, the last columns say how many times as fast it is as each other engine."""
    others = [engine for engine in engines if engine != "quire" and "quire" in engines]
    titles = ["", "roofline ms", "tok/s", *(f"{engine} ms · tok/s · of roofline" for engine in engines)]
    titles += [f"quire / {other}" for other in others]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in found:
        cells = [row["figure"], f"{row['roofline_ms']:,.3f}", f"{row['roofline_tokens_per_s']:,.0f}"]
        measured = row["engines"]
        for engine in engines:
            one = measured.get(engine)
            cells.append(
                "–"
                if one is None
                else f"{one['ms']:,.3f} · {one['tokens_per_s']:,.0f} · {one['share_of_roofline']:.0%}"
            )
        for other in others:
            both = "quire" in measured and other in measured
            cells.append(f"{measured[other]['ms'] / measured['quire']['ms']:.2f}" if both else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
