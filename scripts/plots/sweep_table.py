"""The numbers of a sweep's figure as a table: CSV for programs, Markdown for readers."""

from __future__ import annotations

import pandas as pd

from scripts.plots.sweep import Answer, Cell, label, sort_key
from scripts.plots.table import cell as formatted


def to_csv(answer: Answer) -> str:
    """A row for each point: the keys, mean and standard deviation over seeds, and how many runs there are."""
    question = answer.question
    rows = [
        {
            **({question.hue: label(cell.hue)} if question.hue else {}),
            question.x: label(cell.x),
            f"{question.y}_mean": cell.stat.mean,
            f"{question.y}_std": cell.stat.std,
            "runs": len(cell.runs),
            "diverged": cell.diverged,
        }
        for cell in answer.cells
    ]
    return pd.DataFrame(rows).to_csv(index=False, float_format="%.8g", lineterminator="\n")


def to_markdown(answer: Answer) -> str:
    """A row for each value of x, a column for each curve."""
    question = answer.question
    xs = list(dict.fromkeys(label(cell.x) for cell in sorted(answer.cells, key=lambda cell: sort_key(cell.x))))
    cells = {(label(cell.x), cell.hue): cell for cell in answer.cells}
    headings = [label(hue) if question.hue else question.y for hue in answer.hues]
    lines = [f"| {question.x} | {' | '.join(headings)} |", "|---:|" + "---:|" * len(headings)]
    for x in xs:
        lines.append(f"| {x} | " + " | ".join(text(cells.get((x, hue)), question.y) for hue in answer.hues) + " |")
    return "\n".join(lines) + "\n"


def text(cell: Cell | None, name: str) -> str:
    """A point as a cell of a table, of the number ``name``."""
    if cell is None:
        return "–"
    some = f"{cell.diverged} of {len(cell.runs)} diverged"
    if cell.diverged == len(cell.runs):
        return "diverged"
    number = formatted(cell.stat, ".2%" if name.endswith("accuracy") else "#.3g")
    return f"{number} ({some})" if cell.diverged else number
