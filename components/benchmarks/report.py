"""Report: answers to a benchmark's questions as metrics with intervals, a table, a page, and files that can be scored again."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from components.benchmarks.benchmark import Benchmark, Question, demand_same_ids, text_only_best
from components.benchmarks.tally import CONFIDENCE, RESAMPLES, Tally, interval
from components.chat_template import IMAGE_PLACEHOLDER

PARTIAL = "_partial"
"""Ends the name of a result over a part of the questions."""
WORST = 5
_SHARE_PROMPT = 2  # questions to a prompt, on average
_PACKAGES = ("torch", "transformers", "lightning", "open_clip_torch", "numpy", "pillow")


@dataclass(frozen=True)
class Report:
    """One benchmark's questions and a model's answers in; metrics, a table, a page and files out.

    Args:
        name: Name of the benchmark in the recipe.
        when: Which answers these are, for titles and file names: `at step 500`, `from answers`.
        benchmark: The benchmark.
        asked: Questions that were asked.
        answers: The model's answers, by id: one to each of them.
        total: Questions that the benchmark has.
        exchanged: The same questions with other pictures, if they were asked too.
        exchanged_answers: The answers to those.
    """

    name: str
    when: str
    benchmark: Benchmark
    asked: list[Question]
    answers: dict[str, str]
    total: int
    exchanged: list[Question] | None = None
    exchanged_answers: dict[str, str] | None = None

    @property
    def partial(self) -> bool:
        """Whether fewer questions were asked than there are."""
        return len(self.asked) < self.total

    @property
    def shown_name(self) -> str:
        """The name in the log, in the table and of the files; never that of a full result when it is partial."""
        return self.name + (PARTIAL if self.partial else "")

    @cached_property
    def metrics(self) -> dict[str, float]:
        """What the answers score."""
        return self.benchmark.score(self.answers, self.asked)

    @cached_property
    def tally(self) -> Tally:
        """What the answers to the questions about each picture count."""
        demand_same_ids(self.benchmark.describe(), self.asked, self.answers)
        return self.benchmark.tally(self.asked, self.answers)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The interval of every metric that is a function of sums over pictures, where these differ."""
        resampled = self.benchmark.metrics(self.tally.resampled())
        found = {name: interval(np.asarray(values)) for name, values in resampled.items() if name in self.metrics}
        return {name: low_high for name, low_high in found.items() if low_high is not None}

    @cached_property
    def text_only_best(self) -> dict[str, float]:
        """What the best answers without pictures score on the questions that were asked, if the score is accuracy.

        Empty where few questions share a prompt: there the best answers are the answers themselves, learned by heart.
        """
        prompts = {question.prompt for question in self.asked}
        right_or_wrong = self.benchmark.by_group == "accuracy" and any(question.reference for question in self.asked)
        if not right_or_wrong or len(self.asked) < _SHARE_PROMPT * len(prompts):
            return {}
        return self.benchmark.score(text_only_best(self.benchmark, self.asked), self.asked)

    @cached_property
    def exchanged_metrics(self) -> dict[str, float]:
        """What the answers to the exchanged pictures score; empty if these were not asked."""
        return self.benchmark.score(self.exchanged_answers, self.asked) if self.exchanged_answers else {}

    @cached_property
    def rows(self) -> list[tuple[str, str, int | None]]:
        """What is shown and logged: label, metric and number of questions, first the groups, then the whole."""
        kind, sizes = self.benchmark.by_group, Counter(question.group for question in self.asked)
        counted = self.tally.totals()
        groups = [name.removeprefix(f"{kind}/") for name in self.metrics if name.startswith(f"{kind}/")]
        rows: list[tuple[str, str, int | None]] = [
            (group, f"{kind}/{group}", int(counted.get(f"questions/{group}", sizes[group]))) for group in groups
        ]
        whole = [name for name in self.metrics if "/" not in name and name != "count"]
        scored = int(counted.get("questions", len(self.asked)))
        return rows + [("all" if name == kind else name, name, scored if name == kind else None) for name in whole]

    def logged(self) -> dict[str, float]:
        """Every shown metric and the count by its tag."""
        shown = [metric for _, metric, _ in self.rows] + ["count"]
        values = {f"{self.shown_name}/{metric}": self.metrics[metric] for metric in shown}
        headline = self.benchmark.headline
        if self.exchanged_metrics and headline:
            values[f"{self.shown_name}/{headline}_shuffled_pictures"] = self.exchanged_metrics[headline]
        return values

    # --- to look at

    @cached_property
    def title(self) -> str:
        """Which benchmark, which answers, how many questions."""
        how_many = f"{len(self.asked)} of {self.total} questions, " if self.partial else ""
        return f"{self.shown_name} {self.when}: {how_many}{self.benchmark.describe()}"

    def cells(self) -> list[list[str]]:
        """The table as texts: a heading and one row for each group and for the whole."""
        if not self.rows:
            return [["", "questions"], ["all", str(len(self.asked))]]
        others = {"text-only best": self.text_only_best, "shuffled pictures": self.exchanged_metrics}
        others = {title: values for title, values in others.items() if values}
        decimals = self.benchmark.decimals
        lines = [["", "questions", self.benchmark.by_group, f"{CONFIDENCE:.0%} interval", *others]]
        for label, metric, count in self.rows:
            low_high = " - ".join(f"{edge:.{decimals}f}" for edge in self.intervals.get(metric, ()))
            values = [f"{values[metric]:.{decimals}f}" if metric in values else "" for values in others.values()]
            lines.append([label, "" if count is None else str(count), f"{self.metrics[metric]:.{decimals}f}", low_high, *values])
        return lines

    def table(self) -> str:
        """The title and the table, for the console."""
        lines = [self.title, *aligned(self.cells())]
        lines += [f"{metric} is not available: {reason}" for metric, reason in self.benchmark.not_available(self.asked).items()]
        return "\n".join([*lines, *self.benchmark.remarks(self.metrics)]) + "\n"

    def worst(self) -> list[tuple[str, str, int | None]]:
        """The groups with the lowest scores, lowest first."""
        groups = [row for row in self.rows if "/" in row[1]]
        return sorted(groups, key=lambda row: self.metrics[row[1]])[:WORST]

    def page(self, shown: list[Question]) -> str:
        """Markdown: the table, the worst groups, the commonest mistakes, and the questions shown as pictures."""
        heading, *lines = self.cells()
        parts = [f"### {self.title}", _markdown([heading, *lines])]
        decimals = self.benchmark.decimals
        if worst := [[label, f"{self.metrics[metric]:.{decimals}f}", str(count or "")] for label, metric, count in self.worst()]:
            parts += ["#### Worst categories", _markdown([["category", self.benchmark.by_group, "questions"], *worst])]
        mistakes = Counter(
            (question.group, question.reference, self.answers[question.id])
            for question in self.asked
            if question.reference and not self.benchmark.credit(question, self.answers[question.id])
        )
        if mistakes:
            rows = [[*texts, str(count)] for texts, count in mistakes.most_common(WORST)]
            parts += ["#### Commonest mistakes", _markdown([["category", "reference", "answer", "times"], *rows])]
        if shown:
            texts = [[_words(q.prompt), self.answers[q.id], q.reference, self._worth(q)] for q in shown]
            parts += ["#### Shown as pictures", _markdown([["question", "answer", "reference", "worth"], *texts])]
        return "\n\n".join(parts)

    def _worth(self, question: Question) -> str:
        return f"{self.benchmark.credit(question, self.answers[question.id]):g}"

    # --- to keep

    def record(self) -> dict[str, Any]:
        """Metrics with everything that they depend on, as far as it is known without the model."""
        benchmark = self.benchmark
        headline = benchmark.headline
        return {
            "name": self.name,
            "when": self.when,
            "benchmark": benchmark.stated(),
            "version": benchmark.version,
            "description": benchmark.describe(),
            "split": benchmark.split,
            "prompt": benchmark.prompt,
            "prompt_hash": benchmark.prompt_hash(),
            "normalizer": getattr(benchmark, "normalizer", "its own"),
            "partial": self.partial,
            "questions_asked": len(self.asked),
            "questions": self.total,
            "headline": {headline: self.metrics[headline]} if headline else {},
            "metrics": self.metrics,
            "remarks": benchmark.remarks(self.metrics),
            "not_available": benchmark.not_available(self.asked),
            "intervals": self.intervals,
            "interval_kind": f"{CONFIDENCE:.0%} percentile bootstrap over pictures, {RESAMPLES} resamples",
            "text_only_best": self.text_only_best,
            **({"shuffled_pictures": self.exchanged_metrics} if self.exchanged_metrics else {}),
            "versions": {package: version(package) for package in _PACKAGES},
        }

    def write(self, folder: Path, provenance: dict[str, Any]) -> Path:
        """The answers with their questions, the record, the table, and the upload if there is one, as files.

        Args:
            folder: Where they go.
            provenance: What the caller knows besides: step, recipe, decoding.

        Returns:
            The record's file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = "_".join([self.shown_name, *self.when.split()[1:]])
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.answer_rows())
        record = self.record() | provenance
        files = {"jsonl": lines, "json": json.dumps(record, indent=2) + "\n", "txt": self.table()}
        if (upload := self.benchmark.upload(self.answers)) is not None:
            files["upload.json"] = json.dumps(upload)
        for ending, text in files.items():
            folder.joinpath(f"{stem}.{ending}").write_text(text, encoding="utf-8", errors="replace")
        return folder / f"{stem}.json"

    def answer_rows(self) -> list[dict[str, Any]]:
        """Every question with its answer and what that is worth."""
        rows = []
        for number, question in enumerate(self.asked):
            answer = self.answers[question.id]
            row = asdict(question) | {"answer": answer}
            if question.reference:
                row["credit"] = self.benchmark.credit(question, answer)
            if self.exchanged and self.exchanged_answers:
                row["shuffled_images"] = self.exchanged[number].images
                row["shuffled_answer"] = self.exchanged_answers[question.id]
            rows.append(row)
        return rows


def aligned(cells: list[list[str]]) -> list[str]:
    """Rows of texts in, lines out: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]


def _markdown(cells: list[list[str]]) -> str:
    rows = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in cells]
    heading, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|" + " --- |" * len(rows[0]), *rest])


def _words(prompt: str) -> str:
    return prompt.replace(IMAGE_PLACEHOLDER, "").strip()
