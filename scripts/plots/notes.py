"""What stands below each page: what is missing, and where the numbers come from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Page

from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.runs import Replicates

WIDTH = 226  # characters of the footer's font that fit on a page
NOTE_WIDTH = 170  # characters of the notes' larger one


def status_note(names: Iterable[str], groups: Mapping[str, Replicates], where: str = "") -> str:
    """'missing: a, b · interrupted: c (epoch 7) · diverged: d (epoch 3)', of the runs named."""
    notes: dict[str, list[str]] = {"missing": [], "interrupted": [], "running": [], "diverged": []}
    for name in names:
        if name not in groups:
            notes["missing"].append(name)
            continue
        for run in groups[name].runs:
            if run.status != "finished":
                notes[run.status].append(f"{run.folder.name} (epoch {run.epochs})")
    return " · ".join(f"{status}{where}: {', '.join(members)}" for status, members in notes.items() if members)


def band_note(seeds: Iterable[int]) -> str:
    """What a band is, given how many seeds each curve or point has; nothing where there is no band."""
    several = sorted({count for count in seeds if count > 1})
    return f"bands: one standard deviation over {' or '.join(map(str, several))} seeds" if several else ""


def joined(*notes: str) -> str:
    """Notes in one line, since a page has room for few."""
    return " · ".join(filter(None, notes))


def distinct(values: Iterable[Any]) -> str:
    """The different values, in order of first appearance: '0, 1'."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def short_commit(commit: str | None) -> str:
    """The commit's first ten digits, still '-dirty' where the code had been changed."""
    digits, dash, dirty = (commit or "unknown").partition("-")
    return digits[:10] + dash + dirty


def describe_data(data: dict[str, Any]) -> str:
    """'CIFAR-10, official copy, 45,000 training images'."""
    name = {"cifar10": "CIFAR-10", "digits": "scikit-learn digits"}.get(data["name"], data["name"])
    copy = {True: ", official copy", False: ", NOT the official copy"}.get(data["official"], "")
    return f"{name}{copy}, {data['train_samples']:,} training images"


def describe_epochs(runs: Sequence[RecordedRun]) -> str:
    """'50 (ProxProp), 1000 (BackProp)': the cut of a shortened suite shows here."""
    parts = []
    for kind, is_baseline in (("ProxProp", False), ("BackProp", True)):
        of_kind = [run for run in runs if (run.config.proxprop.optimization_mode == "gradient") == is_baseline]
        lengths = sorted({run.epochs for run in of_kind if run.status != "diverged"})
        if lengths:
            parts.append(f"{', '.join(map(str, lengths))} ({kind})")
    return ", ".join(parts)


def provenance(runs: Sequence[RecordedRun]) -> str:
    """Hardware, data, seed, epochs, threads, versions and date; differing values are all listed."""
    summaries = [run.summary for run in runs if run.summary]
    if not summaries:
        return "No run is finished: hardware, data and date are recorded at a run's end."
    dates = sorted({summary["date"][:10] for summary in summaries})
    fields = {
        "Hardware": distinct(f"{s['device_name']} ({s['device']})" for s in summaries),
        "threads": distinct(s["threads"] for s in summaries),
        "data": distinct(describe_data(s["data"]) for s in summaries),
        "seed": distinct(s["seed"] for s in summaries),
        "epochs run": describe_epochs(runs),
        "PyTorch": distinct(s["torch"] for s in summaries),
        "commit": distinct(short_commit(s["git_commit"]) for s in summaries),
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    }
    # Spaces within a field do not break a line (U+00A0).
    return " · ".join(f"{name}: {value}".replace(" ", "\N{NO-BREAK SPACE}") for name, value in fields.items())


def add_footer(page: Page, runs: Sequence[RecordedRun], notes: Sequence[str]) -> None:
    """Writes the notes and, below them, the provenance at the bottom of the page."""
    footer = textwrap.fill(provenance(runs), WIDTH)
    page.text(0.045, 0.03, footer, fontsize=7.2, color=style.MUTED, va="bottom", linespacing=1.4)
    note = "\n".join(textwrap.fill(note, NOTE_WIDTH) for note in notes if note)
    page.text(0.045, 0.118, note, fontsize=8, fontweight="bold", va="bottom", linespacing=1.3)
