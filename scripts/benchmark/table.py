"""Results as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmark.place import Place, Workload

Results = Mapping[str, Sequence[Sequence[float]]]
"""Workload name -> for each place its results, one a round; none for a round that failed."""


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _cell(rounds: Sequence[float], reference: Sequence[float]) -> str:
    """The median, and its ratio to the first directory's."""
    if not rounds:
        return "-"
    median = statistics.median(rounds)
    if rounds is reference or not reference or not (first := statistics.median(reference)):
        return _shown(median)
    return f"{_shown(median)} ({median / first:.2f}x)"


def _title(workload: Workload) -> str:
    return f"{workload.title} (less is better)" if workload.is_less_better else workload.title


def as_text(places: Sequence[Place], workloads: Mapping[str, Workload], results: Results) -> str:
    rows = [["", "unit", *[place.label for place in places]]]
    for name, per_place in results.items():
        workload = workloads[name]
        cells = [_cell(rounds, per_place[0]) for rounds in per_place]
        rows.append([_title(workload), workload.unit, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def as_json(
    places: Sequence[Place], workloads: Mapping[str, Workload], results: Results
) -> dict[str, object]:
    return {
        name: {
            "title": workloads[name].title,
            "unit": workloads[name].unit,
            "is_less_better": workloads[name].is_less_better,
            "directories": {
                place.label: {"median": statistics.median(rounds) if rounds else None, "rounds": rounds}
                for place, rounds in zip(places, per_place, strict=True)
            },
        }
        for name, per_place in results.items()
    }
