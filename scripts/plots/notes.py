"""What stands below each page: what is missing, and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Page
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.runs import Replicates

NOTE_SIZE, PROVENANCE_SIZE = 8.0, 7.2  # points
NO_BREAK = "\N{NO-BREAK SPACE}"
BOTTOM = 0.03  # of the page's height


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


def band_note(seeds: Iterable[int], what: str = "bands") -> str:
    """What a band (or a bar) is, given how many seeds each curve or point has; nothing where there is none."""
    counts = set(seeds)
    if not counts - {1}:
        return ""
    several = " or ".join(map(str, sorted(counts - {1})))
    return f"{what}: lowest to highest of {several} seeds" + "; a single run has none" * (1 in counts)


def _named(group: Replicates) -> str:
    published = group.runs[0].config.proxprop.optimization_mode.startswith("published")
    return group.name + " (published solver)" * published


def seconds_note(quiet: Sequence[RecordedRun], groups: Iterable[Replicates]) -> str:
    """Where the seconds come from, and which of the `groups` have none; nothing where they are the runs' own."""
    if not quiet:
        return ""
    summaries = [run.summary for run in quiet if run.summary]
    where = distinct(machine(s["device_name"], s["threads"], s["torch"]) for s in summaries)
    without = distinct(_named(group) for group in groups if not math.isfinite(group.seconds))
    note = f"seconds: medians of shorter runs of the same settings on a quiet machine ({where})"
    return note + (f"; none for {without}" if without else "")


def machine(device: str, threads: int, torch: str) -> str:
    return f"{device}, {threads} thread{'s' * (threads != 1)}, PyTorch {torch}"


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
    for is_baseline in (False, True):
        of_kind = [run for run in runs if (run.config.proxprop.optimization_mode == "gradient") == is_baseline]
        are_plain = all(run.config.optimizer.name in ("sgd", "adam") for run in of_kind)
        kind = ("BackProp" if are_plain else "without ProxProp") if is_baseline else "ProxProp"
        lengths = sorted({run.epochs for run in of_kind if run.status != "diverged"})
        if lengths:
            parts.append(f"{', '.join(map(str, lengths))} ({kind})")
    return ", ".join(parts)


def provenance(runs: Sequence[RecordedRun]) -> str:
    """Hardware, data, seed, epochs, threads, versions and date; what differs, in parts of a run too, is all listed."""
    summaries = [run.summary for run in runs if run.summary]
    if not summaries:
        return "No run is finished: hardware, data and date are recorded at a run's end."
    environments = [one for s in summaries for one in (*s.get("earlier_environments", ()), s)]
    dates = sorted({summary["date"][:10] for summary in summaries})
    fields = {
        "Hardware": distinct(f"{one['device_name']} ({one['device']})" for one in environments),
        "threads": distinct(one["threads"] for one in environments),
        "data": distinct(describe_data(s["data"]) for s in summaries),
        "seed": distinct(sorted(s["seed"] for s in summaries)),
        "epochs run": describe_epochs(runs),
        "PyTorch": distinct(one["torch"] for one in environments),
        "commit": distinct(short_commit(one["git_commit"]) for one in environments),
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    }
    # A line breaks between fields and after a comma alone (U+00A0).
    text = " · ".join(f"{name}: {value}".replace(" ", NO_BREAK) for name, value in fields.items())
    return text.replace(f",{NO_BREAK}", ", ")


@dataclass(frozen=True)
class Footer:
    """The notes and, below them, the provenance, as lines that fit the page's width.

    Attributes:
        top: Where they end, as a fraction of the page's height from below.
    """

    notes: tuple[str, ...]
    provenance: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[RecordedRun], notes: Iterable[str]) -> Footer:
        return cls(
            tuple(line for note in notes if note for line in wrapped(note, NOTE_SIZE, "bold")),
            tuple(wrapped(provenance(runs), PROVENANCE_SIZE)),
        )

    @property
    def top(self) -> float:
        return self._notes_bottom + _height(len(self.notes), NOTE_SIZE)

    @property
    def _notes_bottom(self) -> float:
        return BOTTOM + _height(len(self.provenance), PROVENANCE_SIZE) + 0.012

    def draw(self, page: Page) -> None:
        for lines, bottom, size, options in (
            (self.provenance, BOTTOM, PROVENANCE_SIZE, {"color": style.MUTED}),
            (self.notes, self._notes_bottom, NOTE_SIZE, {"fontweight": "bold"}),
        ):
            for index, line in enumerate(reversed(lines)):
                page.text(style.LEFT, bottom + _height(index, size), line, fontsize=size, va="bottom", **options)


def _height(lines: int, size: float) -> float:
    """Of so many lines of text, as a fraction of the page's height."""
    return lines * 1.4 * size / 72 / style.PAGE[1]


def wrapped(text: str, size: float, weight: str = "normal") -> list[str]:
    """``text`` in lines that fit between the page's margins."""
    font = FontProperties(family=style.RC["font.family"], size=size, weight=weight)
    room = (1 - 2 * style.LEFT) * style.PAGE[0] * 72
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if not line or text_to_path.get_text_width_height_descent(longer, font, ismath=False)[0] <= room:
            line = longer
        else:
            lines.append(line)
            line = word
    return [*lines, line]
