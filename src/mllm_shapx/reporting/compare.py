"""Compares runs of one set or of several on the rows that they share (`compare`)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from mllm_shapx.errors import UsageError
from mllm_shapx.records.spec import differences, result_settings
from mllm_shapx.reporting.agreement import TOP_K, AgreementSummary, AgreementTally, mean, summary
from mllm_shapx.reporting.grid import grid, names, numbers
from mllm_shapx.reporting.html import PageSettings, page
from mllm_shapx.reporting.page_audio import MOST_SOUND
from mllm_shapx.reporting.reading import RunFiles, StudyFiles, open_study
from mllm_shapx.reporting.study_figures import Costs, StudyRows, unreadable_notes


@dataclass(frozen=True, slots=True)
class RunCosts:
    """One of the compared runs; means are None where it has no sample that can be read."""

    name: str
    place: str
    """Its directory."""
    samples: int
    unreadable: int
    """Damaged samples, which are left out."""
    n_calls: float | None
    """Coalitions evaluated per sample."""
    model_calls: float | None
    """Answers generated per sample; None for the older runner, which does not record them."""
    seconds: float | None
    """Runtime per sample."""


@dataclass(frozen=True, slots=True)
class PairFigures:
    """The agreement of two runs."""

    first: str
    second: str
    found: AgreementSummary
    settings: tuple[str, ...]
    """Settings that differ, other than those of the estimator, as dotted keys."""

    def to_json(self) -> dict[str, Any]:
        """Return the pair as JSON data."""
        found = asdict(self.found)
        not_compared = found.pop("not_compared")
        names = {"first": self.first, "second": self.second}
        return {**names, **found, **not_compared, "settings": list(self.settings)}

    @property
    def notes(self) -> list[str]:
        """Return which rows of the pair are not compared, and which other settings differ."""
        said = self.found.left_out_in_words(self.first)
        if self.settings:
            said.append(f"settings differ from {self.first}: {', '.join(self.settings)}")
        return said


@dataclass(frozen=True)
class Comparison:
    """The first of some runs, compared with each of the others."""

    study: StudyFiles
    """The runs, as if they were of one set."""
    runs: tuple[RunCosts, ...]
    pairs: tuple[PairFigures, ...]
    top_k: int

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return {
            "top_k": self.top_k,
            "runs": [asdict(run) for run in self.runs],
            "pairs": [pair.to_json() for pair in self.pairs],
        }

    def to_text(self, width: int) -> str:
        """Return two tables of at most `width` columns, and what was not compared."""
        lines = [*self._costs(width), "", f"{self.pairs[0].first} against", *self._agreements(width)]
        lines += [f"  top {self.top_k}: share of the most important players that both runs have"]
        for pair in self.pairs:
            lines += [f"{pair.second}: {said}" for said in pair.notes]
        counts = {run.name: run.unreadable for run in self.runs}
        lines += unreadable_notes(counts)
        return "\n".join(lines) + "\n"

    def to_html(self, most_sound: int = MOST_SOUND) -> str:
        """Return a page like the report's, with the table of pairs and the runs of each row side by side."""
        names = [run.name for run in self.runs]
        notes = [f"{pair.second}: {said}." for pair in self.pairs for said in pair.notes]
        settings = PageSettings(
            most_sound=most_sound,
            title="Comparison of runs",
            subtitle=" · ".join(run.place for run in self.runs),
            names=names,
            pairs=[{**pair.to_json(), "left_out": pair.found.left_out} for pair in self.pairs],
            top_k=self.top_k,
            notes=notes,
            side_by_side=True,
        )
        return page(self.study, settings)

    def _costs(self, width: int) -> list[str]:
        cells = [
            [
                run.name,
                f"{run.samples:,}",
                _said(run.n_calls, ",.1f"),
                _said(run.model_calls, ",.1f"),
                _said(run.seconds, ",.3g"),
            ]
            for run in self.runs
        ]
        titles = numbers("samples", "coalitions each", "generated each", "s each")
        return grid([*names("run"), *titles], cells, width)

    def _agreements(self, width: int) -> list[str]:
        cells = [
            [
                pair.second,
                f"{pair.found.rows:,}",
                _said(pair.found.spearman, ".3f"),
                _said(pair.found.pearson, ".3f"),
                _said(pair.found.top, ".0%"),
                _said(pair.found.same_first, ".0%"),
                _said(pair.found.sign_changes, ".1%"),
                _said(pair.found.difference, ".3g"),
                _said(pair.found.same_answer, ".0%"),
            ]
            for pair in self.pairs
        ]
        titles = numbers("rows", "r rank", "r", f"top {self.top_k}", "first", "signs", "|diff|", "answer")
        return grid([*names("run"), *titles], cells, width)


def compare(directories: Sequence[str], top_k: int = TOP_K) -> Comparison:
    """Compare the first run with each other one, row by row.

    Args:
        directories: Directories of runs, or of experiment sets, which stand for all their runs.
        top_k: How many players count as the most important ones.

    Raises:
        UsageError: When a directory holds no results, or there are fewer than two runs.
    """
    runs = _runs(directories)
    if len(runs) < 2:  # noqa: PLR2004 -- a pair
        raise UsageError(
            "compare needs two runs or more: give the directories of runs, or of an experiment set"
        )
    study = StudyFiles(runs[0].records.storage, tuple(runs))
    called = _names(runs)
    samples_of = StudyRows(study)
    tallies = [AgreementTally(top_k) for _ in runs[1:]]
    costs = [Costs() for _ in runs]
    for _, samples in samples_of:
        for of_run, sample in zip(costs, samples, strict=True):
            if sample is not None:
                of_run.add(sample)
        for tally, sample in zip(tallies, samples[1:], strict=True):
            tally.add(samples[0], sample)
    return Comparison(
        study,
        tuple(
            RunCosts(
                name=name,
                place=run.records.storage.locate(run.name),
                samples=len(of_run.n_calls),
                unreadable=unreadable,
                n_calls=mean(of_run.n_calls),
                model_calls=None if run.is_of_older_runner else mean(of_run.model_calls),
                seconds=mean(of_run.seconds),
            )
            for name, run, of_run, unreadable in zip(called, runs, costs, samples_of.unreadable, strict=True)
        ),
        tuple(
            PairFigures(called[0], name, summary(tally), tuple(_settings(runs[0], run)))
            for tally, name, run in zip(tallies, called[1:], runs[1:], strict=True)
        ),
        top_k,
    )


def _runs(directories: Sequence[str]) -> list[RunFiles]:
    found: dict[str, RunFiles] = {}
    for directory in directories:
        for run in open_study(directory).runs:
            found.setdefault(run.records.storage.locate(run.name), run)
    return list(found.values())


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell all of them apart."""
    paths = [PurePosixPath(run.records.storage.locate(run.name)).parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _settings(first: RunFiles, second: RunFiles) -> list[str]:
    if result_settings(first.spec) is None or result_settings(second.spec) is None:
        return []
    return differences(dict(first.compared_settings), dict(second.compared_settings))


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
