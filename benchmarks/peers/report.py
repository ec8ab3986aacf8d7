"""What the records say: medians with their spread, ratios of turns taken side by side, Markdown, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
Workloads = Mapping[str, Mapping[str, Any]]
Contestant = tuple[str, str]
"""Peer and precision."""

OURS = "quire"
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a workload's record. `value` gets the record and the workload's fields."""

    workload: str
    title: str
    higher_is_better: bool
    value: Callable[[Record, Mapping[str, Any]], float]

    def of(self, records: Sequence[Record], workloads: Workloads) -> dict[Contestant, dict[int, float]]:
        """By contestant and turn."""
        found: dict[Contestant, dict[int, float]] = {}
        for record in records:
            if self.workload in ("", record["workload"]):
                fields = workloads.get(record["workload"], {})
                by_turn = found.setdefault((record["peer"], record["precision"]), {})
                value = self.value(record, fields)
                by_turn[record["turn"]] = max(value, by_turn.get(record["turn"], value))
        return found


def _decode_rate(record: Record, workload: Mapping[str, Any]) -> float:
    return (workload["output_len"] - 1) / (record["seconds"] - record["first_token_s"])


def _prompt_rate(record: Record, workload: Mapping[str, Any]) -> float:
    return workload["num_prompts"] * (workload["shared_len"] + workload["input_len"]) / record["seconds"]


def _output_rate(record: Record, workload: Mapping[str, Any]) -> float:
    return workload["num_prompts"] * workload["output_len"] / record["seconds"]


def _served_rate(record: Record, _: Mapping[str, Any]) -> float:
    return record["output_tokens"] / record["seconds"]


def _above_weights(record: Record, _: Mapping[str, Any]) -> float:
    """At least a MiB: of a mapped file, little may have been read so far."""
    return max(record["loaded_bytes"] - record["weight_bytes"], 2**20) / GIB


METRICS = (
    Metric("W1", "W1 decode tok/s", True, _decode_rate),
    Metric("W1", "W1 first token s", False, lambda record, _: record["first_token_s"]),
    Metric("W2", "W2 prompt tok/s", True, _prompt_rate),
    Metric("W3", "W3 output tok/s", True, _output_rate),
    Metric("W4", "W4 output tok/s", True, _output_rate),
    Metric("W5", "W5 output tok/s", True, _served_rate),
    Metric("W5", "W5 TPOT p50 ms", False, lambda record, _: record["tpot_p50_ms"]),
    Metric("W5r", "W5 at 2/s: requests/s", True, lambda record, _: record["requests_per_s"]),
    Metric("W5r", "W5 at 2/s: TTFT p99 s", False, lambda record, _: record["ttft_p99_ms"] / 1e3),
    Metric("W6", "W6 first token s", False, lambda record, _: record["seconds"]),
    Metric("", "W7 RSS GiB loaded", False, lambda record, _: record["loaded_bytes"] / GIB),
    Metric("", "W7 of it above weights", False, _above_weights),
    Metric("", "W7 RSS GiB at most", False, lambda record, _: record["resident_bytes"] / GIB),
)


def spread(values: Sequence[float]) -> str:
    """Median [least–most]."""
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float], higher_is_better: bool) -> list[float]:
    """Of each turn that both took; above 1 is in our favour whichever way the metric counts."""
    both = sorted(ours.keys() & theirs.keys())
    return [ours[turn] / theirs[turn] if higher_is_better else theirs[turn] / ours[turn] for turn in both]


def rivals(ours: Contestant, others: Sequence[Contestant]) -> list[Contestant]:
    """The peers at the same precision, and at bf16 those that have no such one."""
    found = []
    for peer in dict.fromkeys(name for name, _ in others if name != OURS):
        offered = [precision for name, precision in others if name == peer]
        chosen = ours[1] if ours[1] in offered else "bf16"
        if chosen in offered:
            found.append((peer, chosen))
    return found


def markdown(figures: Mapping[str, Any]) -> str:
    """A table of figures, one of ratios, and what the machine was like."""
    tables = {metric: metric.of(figures["records"], figures["workloads"]) for metric in METRICS}
    shown = [metric for metric in METRICS if tables[metric]]
    contestants = list(dict.fromkeys((record["peer"], record["precision"]) for record in figures["records"]))
    lines = [_conditions(figures), "", *_header(["engine", *(metric.title for metric in shown)])]
    for each in contestants:
        cells = [spread(list(values.values())) if (values := tables[metric].get(each)) else "" for metric in shown]
        lines.append(_row([" ".join(each), *cells]))
    pairs = [(each, rival) for each in contestants if each[0] == OURS for rival in rivals(each, contestants)]
    if pairs:
        lines += ["", "Ratios of turns taken side by side; above 1 is in quire's favour.", ""]
        lines += _header(["quire / peer", *(metric.title for metric in shown)])
    for each, rival in pairs:
        both = [
            ratios(tables[metric].get(each, {}), tables[metric].get(rival, {}), metric.higher_is_better)
            for metric in shown
        ]
        cells = [spread(found) if found else "" for found in both]
        lines.append(_row([f"{' '.join(each)} / {' '.join(rival)}", *cells]))
    return "\n".join(lines) + "\n"


def _conditions(figures: Mapping[str, Any]) -> str:
    machine, records = figures["machine"], figures["records"]
    bandwidths = [record["read_gb_per_s"] for record in records]
    others = [record["others_cpu"] for record in records if "others_cpu" in record]
    parts = [
        f"{figures['checkpoint']}, {figures['date']}, {machine['cpu']}",
        f"{machine['threads']} threads, {machine['memory_gib']} GiB",
        f"memory read before each turn {spread(bandwidths)} GB/s" if bandwidths else "nothing measured",
        f"at most {max(others):.0%} of the cores taken by others" if others else "",
    ]
    return ", ".join(part for part in parts if part) + ". Median [least–most] of the turns."


def _header(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---|" + "---:|" * (len(cells) - 1)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """A panel for each metric, a bar for each engine: medians, with whiskers from least to most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = {metric: metric.of(figures["records"], figures["workloads"]) for metric in METRICS}
    shown = [metric for metric in METRICS if tables[metric]]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    most = max(len(tables[metric]) for metric in shown)
    figure = Figure(figsize=(4.2 * columns, rows * (1.0 + 0.28 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for metric, axes in zip(shown, panels, strict=False):
        bars = [(each, list(values.values())) for each, values in tables[metric].items()]
        names = [" ".join(each) for each, _ in bars]
        middles = [statistics.median(values) for _, values in bars]
        below = [middle - min(values) for middle, (_, values) in zip(middles, bars, strict=True)]
        above = [max(values) - middle for middle, (_, values) in zip(middles, bars, strict=True)]
        colours = ["tab:orange" if each[0] == OURS else "tab:gray" for each, _ in bars]
        axes.barh(names, middles, xerr=[below, above], color=colours, ecolor="black", capsize=2)
        axes.invert_yaxis()
        axes.set_title(f"{metric.title} ({'more' if metric.higher_is_better else 'less'} is better)", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path, format="png", dpi=120)
