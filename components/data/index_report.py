"""What `python main.py index` reports: counts against img2dataset's own, what was put aside and why, and how long everything is.

Source: github.com/rom1504/img2dataset, logger.py (`NAME_stats.json` beside each shard).
"""

import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from components.data.histograms import Counts, in_words, picture
from components.data.metadata import beside
from components.data.shard_files import in_parallel
from components.errors import RecipeError
from components.shards.rows import Audit, ShardIndex
from components.shards.storage import Storage
from components.shards.tar import Problem

LISTED = 200
"""Samples, or shards, that a page lists one by one; the files beside the index have them all."""
IN_TERMINAL = 5
_TOGETHER = 32  # shards that a process adds up, so that few numbers wait to be added
_SHOWN = ("count", "successes", "failed_to_download", "failed_to_resize")
"""What img2dataset counts, in the order of the table."""
_PICTURES = (("characters", "caption", "characters"), ("width", "picture width", "pixels"), ("height", "picture height", "pixels"))
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --line: #c9c9ce; --dim: #6b6b70; --note: #d97706; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #18181b; --line: #48484e; --dim: #a0a0a8; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-top: 1.5rem; }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; } figcaption { color: var(--dim); } svg { width: 100%; }
.note { border-left: 4px solid var(--note); padding-left: .8rem; }
table { border-collapse: collapse; } th, td { text-align: right; padding: 2px 12px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words td, .words th { text-align: left; } .words td { word-break: break-word; }
"""


@dataclass
class SourceReport:
    """What is known of one source, or of the shards of a command line.

    Args:
        name: Its name in the recipe.
        files: Its shards; 0 where it has none.
        samples: Samples that can be used.
        num_bytes: Their bytes.
        problems: How many of each kind are wrong in the shards.
        first: Shard and problem of the first of them.
        stats: img2dataset's numbers, summed over the shards that have them.
        differences: Shards that have another number of samples than img2dataset wrote: name, samples, successes.
        use: What the samples are used for, and why some of them are not.
        histograms: Title, unit and counts of each picture.
        notes: What else is to be said.
    """

    name: str
    samples: int
    files: int = 0
    num_bytes: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, Problem]] = field(default_factory=list)
    stats: Counter[str] = field(default_factory=Counter)
    differences: list[tuple[str, int, int]] = field(default_factory=list)
    use: dict[str, int] = field(default_factory=dict)
    histograms: list[tuple[str, str, Counts]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """What is counted, and the number."""
        size = f"{self.num_bytes / 2**30:,.3g} GiB"
        rows = [("shards", f"{self.files:,}, {size}")] * bool(self.files) + [("samples", f"{self.samples:,}")]
        rows += [(f"put aside: {kind}", f"{count:,}") for kind, count in self.problems.most_common()]
        rows += [(f"img2dataset: {key}", f"{self.stats[key]:,}") for key in _SHOWN if key in self.stats]
        return rows + [(what, f"{count:,}") for what, count in self.use.items()]


def report_of_shards(name: str, index: ShardIndex, audits: list[Audit], storage: Storage, processes: int) -> SourceReport:
    """Look at every shard of an index.

    Args:
        name: Name of the source.
        index: The index.
        audits: What was found in each shard.
        storage: Reads img2dataset's numbers.
        processes: Processes that share the work, >= 1.
    """
    found = SourceReport(name, int(index.sizes.sum()), files=len(index.names))
    for audit in audits:
        found.num_bytes += audit.size
        found.problems.update(audit.counts)
    totals: dict[str, Counts] = {}
    unread = []
    firsts = range(0, len(index.names), _TOGETHER)
    for first, (some, counts) in zip(
        firsts, in_parallel(_Look(index, storage), firsts, processes, "report", f"{_TOGETHER} shards"), strict=True
    ):
        _add(totals, counts)
        for shard, stats in enumerate(some, start=first):
            if isinstance(stats, str):
                unread.append(stats)
                continue
            found.stats.update({key: stats[key] for key in _SHOWN if isinstance(stats.get(key), int)})
            expected = stats.get("successes")
            if isinstance(expected, int) and expected != index.sizes[shard]:
                found.differences.append((index.names[shard], int(index.sizes[shard]), expected))
    if unread:
        found.notes.append(f"img2dataset's numbers of {len(unread):,} shards are left out: {unread[0]}")
    found.histograms = [(title, unit, totals[column]) for column, title, unit in _PICTURES if column in totals]
    if "aspect" in totals:
        found.histograms.append(("picture width / height", "", totals["aspect"]))
    return found


def _add(totals: dict[str, Counts], counts: dict[str, Counts]) -> None:
    for column, some in counts.items():
        totals[column] = totals[column] + some if column in totals else some


@dataclass
class _Look:
    """The number of the first of a few shards in; img2dataset's numbers of each, or why they cannot be read, and counts of the
    columns of their index out.
    """

    index: ShardIndex
    storage: Storage

    def __call__(self, first: int) -> tuple[list[dict[str, Any] | str], dict[str, Counts]]:
        totals: dict[str, Counts] = {}
        shards = range(first, min(first + _TOGETHER, len(self.index.names)))
        for shard in shards:
            _add(totals, self.counts(shard))
        return [self.stats(self.index.names[shard]) for shard in shards], totals

    def counts(self, shard: int) -> dict[str, Counts]:
        rows = self.index.rows(shard)
        counts = {column: Counts.of(rows[column]) for column, _, _ in _PICTURES} if len(rows) else {}
        known = rows[(rows["width"] > 0) & (rows["height"] > 0)]
        if len(known):
            # hundredths of an octave: few enough values to be added up over thousands of shards
            octaves = np.log2(known["width"].astype(np.float64) / known["height"])
            counts["aspect"] = Counts.of(np.exp2(np.round(octaves * 100) / 100))
        return counts

    def stats(self, url: str) -> dict[str, Any] | str:
        try:
            text = beside(url, "_stats.json", self.storage)
            stats = {} if text is None else json.loads(text)
        except RecipeError as error:
            return str(error)
        except (ValueError, RecursionError) as error:
            return f"the _stats.json beside {url} is not JSON ({error})."
        return stats if isinstance(stats, dict) else f"the _stats.json beside {url} is not an object."


def in_text(reports: Iterable[SourceReport]) -> str:
    """The report as a table for a terminal."""
    lines = []
    for report in reports:
        rows = report.rows()
        width = max(len(what) for what, _ in rows)
        lines += [report.name, *(f"  {what:<{width}}  {number:>14}" for what, number in rows)]
        for title, unit, counts in report.histograms:
            lines.append(f"  {title}{f' ({unit})' if unit else ''}: {in_words(counts)}")
        if report.differences:
            lines.append(f"  {len(report.differences):,} shards have another number of samples than img2dataset wrote:")
            lines += [f"    {shard}: {here:,} of {there:,}" for shard, here, there in report.differences[:IN_TERMINAL]]
        if report.problems:
            lines.append(f"  the first of what was put aside, of {report.problems.total():,}:")
            lines += [
                f"    {shard} {problem.key} {problem.kind}: {problem.reason}" for shard, problem in report.first[:IN_TERMINAL]
            ]
        lines += [f"  {note}" for note in report.notes]
    return "\n".join(map(printable, lines))


def printable(line: str) -> str:
    """Names of shards and members may hold what moves the cursor of a terminal, and what is no text at all."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


def in_html(title: str, reports: Iterable[SourceReport]) -> str:
    """The report as a page. Everything that comes from the data is escaped, and no script runs."""
    body = [f"<h1>{_escape(title)}: index</h1>"]
    for report in reports:
        counted = "".join(f"<tr><td>{_escape(what)}</td><td>{number}</td></tr>" for what, number in report.rows())
        body += [f"<h2>{_escape(report.name)}</h2>", *(f'<p class="note">{_escape(note)}</p>' for note in report.notes)]
        body += [f"<table>{counted}</table>", '<div class="histograms">']
        for name, unit, counts in report.histograms:
            body.append(picture(name, unit, counts, logarithmic=not unit))
        body.append("</div>")
        if report.differences:
            body.append("<h3>Other numbers of samples than img2dataset wrote</h3>")
            rows = report.differences[:LISTED]
            body.append(_table(("shard", "samples", "img2dataset: successes"), rows, len(report.differences)))
        if report.problems:
            cells = [(shard, problem.key, problem.kind, problem.reason, problem.offset) for shard, problem in report.first]
            body.append("<h3>Put aside</h3>")
            body.append(_table(("shard", "key", "what", "reason", "byte"), cells, report.problems.total()))
    head = f'<meta charset="utf-8"><title>{_escape(title)}: index</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]], total: int) -> str:
    cells = ["".join(f"<td>{_escape(str(cell))}</td>" for cell in row) for row in rows]
    rest = f"<p>The first {len(rows)} of {total:,}.</p>" if len(rows) < total else ""
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<table class="words"><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{lines}</table>{rest}'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
