"""The plots of a study for the report and for papers: Vega-Lite specifications, drawn by vl-convert."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from mllm_shapx.errors import UsageError
from mllm_shapx.reporting.study_figures import BINS, RunSeries, StudyFigures

type Spec = dict[str, Any]

INSTALL = "pip install 'mllm-shapx[plots]'"

_VERSION = "6.1"
"""Version of Vega-Lite; vl-convert has several."""
_TIP: Spec = {"description": {"field": "tip"}}
_BAR: Spec = {"type": "bar", "height": 11}


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours and font of a plot, as SVG takes them."""

    ink: str
    soft: str
    line: str
    font: str
    series: tuple[str, ...]
    size: float = 11
    """Of the text, in pixels."""


PAGE = Theme(
    "var(--ink)",
    "var(--soft)",
    "var(--line)",
    "system-ui, sans-serif",
    tuple(f"var(--c{n})" for n in range(1, 9)),
    # Larger than in the stylesheet: the reader's font may be wider than the font that is measured here.
    size=13,
)
"""For the report, whose stylesheet defines the colours for light and dark displays."""

PAPER = Theme(
    "#000000",
    "#333333",
    "#dddddd",
    "Helvetica, Arial, Liberation Sans, sans-serif",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#666666"),
)
"""For papers: colours for people with any colour vision (Okabe and Ito)."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    caption: str
    """What is shown, in a sentence or two."""
    spec: Spec
    """Vega-Lite, with its data."""

    def svg(self) -> str:
        """Return the plot as SVG.

        Raises:
            UsageError: When vl-convert is not installed.
        """
        drawn: str = _library().vegalite_to_svg(self.spec, vl_version=_VERSION)
        return drawn

    def pdf(self) -> bytes:
        """Return the plot as PDF.

        Raises:
            UsageError: When vl-convert is not installed.
        """
        drawn: bytes = _library().vegalite_to_pdf(self.spec, vl_version=_VERSION)
        return drawn


def can_draw() -> bool:
    """Return whether vl-convert is installed, which draws without a browser or a network."""
    try:
        _library()
    except UsageError:
        return False
    return True


def _library() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError(f"plots need the package vl-convert-python; install it with: {INSTALL}") from error
    return vl_convert


def charts(figures: StudyFigures, theme: Theme) -> list[Chart]:
    """Return the plots for which a study has data."""
    runs = sorted((run for run in figures.runs if run.n_calls), key=_in_order)
    made = [_errors(figures), _costs(runs), _modalities(runs), _values(runs), _positions(runs)]
    return [replace(chart, spec=_themed(chart.spec, theme)) for chart in made if chart is not None]


def _in_order(run: RunSeries) -> tuple[bool, list[tuple[int, str]]]:
    """Return a key that puts `exact` first and `ns16` before `ns128`."""
    parts = re.findall(r"(\d+)|(\D+)", run.name)
    return run.name != "exact", [(int(number or -1), text) for number, text in parts]


def _themed(spec: Spec, theme: Theme) -> Spec:
    text = {
        "labelFont": theme.font,
        "titleFont": theme.font,
        "labelColor": theme.soft,
        "titleColor": theme.ink,
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "background": None,
        "padding": 4,
        **spec,
        "config": {
            "font": theme.font,
            "view": {"stroke": None},
            "axis": {
                **text,
                "gridColor": theme.line,
                "domainColor": theme.line,
                "tickColor": theme.line,
                "labelFontSize": theme.size,
                "titleFontSize": theme.size,
                "titleFontWeight": "normal",
                "labelLimit": 260,
            },
            "legend": {**text, "labelFontSize": theme.size, "labelLimit": 230, "symbolOpacity": 1},
            "range": {"category": list(theme.series)},
            "rule": {"color": theme.soft},
            "bar": {"color": theme.series[0]},
            "rect": {"color": theme.series[0]},
            "tick": {"color": theme.ink},
        },
    }


def _errors(figures: StudyFigures) -> Chart | None:
    data = [
        {
            "estimator": row.estimator,
            "calls": row.n_calls,
            "error": row.found.difference,
            "low": row.error_low,
            "high": row.error_high,
            "tip": f"{row.group}: error {row.found.difference:.3g} with {row.n_calls:,.1f} coalitions, "
            f"half of {row.found.rows:,} samples from {row.error_low:.3g} to {row.error_high:.3g}",
        }
        for row in figures.errors()
    ]
    if not data:
        return None
    title = "mean |error| per player"
    scale = {"type": "log", "nice": False, "padding": 12}
    legend = {"title": None, "orient": "bottom", "columns": 2, "direction": "horizontal"}
    line = {"type": "line", "strokeWidth": 1.5}
    rule = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.55}
    point = {"type": "point", "filled": True, "size": 55, "opacity": 1}
    spec: Spec = {
        "width": 340,
        "height": 210,
        "data": {"values": data},
        "encoding": {
            "x": _number("calls", "coalitions evaluated per sample (mean)", scale=scale),
            "color": {"field": "estimator", "type": "nominal", "legend": legend},
        },
        "layer": [
            {"mark": line, "encoding": {"y": _number("error", title)}},
            {"mark": rule, "encoding": {"y": _number("low", title), "y2": {"field": "high"}, **_TIP}},
            {"mark": point, "encoding": {"y": _number("error", title), **_TIP}},
        ],
    }
    caption = (
        "Mean over players of the difference from the exact value, averaged over rows and seeds; the bar "
        "spans the middle half of the samples. Budgets of one estimator are joined."
    )
    return Chart("error_against_budget", "Error against budget", caption, spec)


def _costs(runs: Sequence[RunSeries]) -> Chart | None:
    if not runs:
        return None
    data = []
    for run in runs:
        entry: dict[str, Any] = {"run": run.name}
        for title, read, _ in _MEASURES:
            entry[title] = fmean(read(run))
            entry[f"{title} tip"] = f"{run.name}: {entry[title]:,.3g} {title} per sample"
        data.append(entry)
    parts = [
        {
            "width": 105,
            "height": {"step": 18},
            "mark": _BAR,
            "encoding": {
                "y": _runs(runs, shows_names=position == 0),
                "x": _number(title, title, axis={"tickCount": 2, "format": form}),
                "description": {"field": f"{title} tip"},
            },
        }
        for position, (title, _, form) in enumerate(_MEASURES)
    ]
    caption = (
        "Per sample: coalitions that the run evaluated; answers that were generated for it rather than for "
        "another run; runtime."
    )
    spec: Spec = {"data": {"values": data}, "hconcat": parts, "spacing": 14}
    return Chart("costs", "Calls and runtime", caption, spec)


_MEASURES: tuple[tuple[str, Callable[[RunSeries], Sequence[float]], str], ...] = (
    ("coalitions", lambda run: run.n_calls, "~s"),
    ("answers generated", lambda run: run.model_calls, "~s"),
    ("seconds", lambda run: run.seconds, "~g"),
)
"""Title, the samples' figures, and how they are written on an axis."""


def _modalities(runs: Sequence[RunSeries]) -> Chart | None:
    known = [run for run in runs if run.text]
    if not any(any(run.text) for run in known) or not any(any(run.audio) for run in known):
        return None
    data = [
        {"run": run.name, "modality": name, "share": share, "tip": f"{run.name}: {share:.1%} on {name}"}
        for run in known
        for name, share in (("text", fmean(run.text)), ("audio", fmean(run.audio)))
    ]
    encoding = {
        "x": _number("share", "share of the absolute values", axis={"format": "%", "tickCount": 5}),
        "color": {"field": "modality", "type": "nominal", "legend": {"title": None, "orient": "bottom"}},
    }
    spec = _by_run(known, data, encoding, mark=_BAR)
    return Chart("share_by_modality", "Share by modality", "Mean over samples.", spec)


def _values(runs: Sequence[RunSeries]) -> Chart | None:
    data = []
    for run in runs:
        if run.values:
            low, first, middle, third, high = np.quantile(run.values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
            quantiles = {"low": low, "first": first, "middle": middle, "third": third, "high": high}
            tip = (
                f"{run.name}: 5% {low:.3g}, 25% {first:.3g}, median {middle:.3g}, 75% {third:.3g}, "
                f"95% {high:.3g}"
            )
            data.append({"run": run.name, **quantiles, "tip": tip})
    if not data:
        return None
    tick = {"type": "tick", "size": 13, "thickness": 2}
    layer = [
        {"mark": "rule", "encoding": {"x": _number("low", "value"), "x2": {"field": "high"}}},
        {"mark": _BAR, "encoding": {"x": _number("first", "value"), "x2": {"field": "third"}}},
        {"mark": tick, "encoding": {"x": _number("middle", "value")}},
    ]
    caption = "Over all players of all samples: median, the middle half, and the range from 5% to 95%."
    spec = _by_run(runs, data, {}, layer=layer)
    return Chart("distribution_of_values", "Distribution of values", caption, spec)


def _positions(runs: Sequence[RunSeries]) -> Chart | None:
    data = list(_position_cells(runs))
    if not data:
        return None
    axis = {
        "title": "place in the prompt, in tenths",
        "labelAngle": 0,
        "labelExpr": f"datum.value == 1 ? 'first' : datum.value == {BINS} ? 'last' : ''",
        "ticks": False,
    }
    opacity = {"type": "quantitative", "scale": {"range": [0.04, 1]}, "legend": None}
    encoding = {
        "x": {"field": "bin", "type": "ordinal", "axis": axis},
        "fillOpacity": {"field": "share", **opacity},
    }
    spec = _by_run([run for run in runs if any(run.positions)], data, encoding, mark={"type": "rect"})
    caption = "Where in the prompt the value of largest size is: the stronger the colour, the more samples."
    return Chart("position_of_largest", "Position of the largest value", caption, spec)


def _position_cells(runs: Sequence[RunSeries]) -> Iterator[Spec]:
    for run in runs:
        total = sum(run.positions)
        for place, count in enumerate(run.positions if total else ()):
            said = (
                f"{run.name}: {count / total:.0%} of {total:,.0f} samples in tenth {place + 1} of the prompt"
            )
            yield {"run": run.name, "bin": place + 1, "share": count / total, "tip": said}


def _by_run(runs: Sequence[RunSeries], data: list[Spec], encoding: Spec, **marks: Any) -> Spec:
    """Return a plot with a line for each run."""
    return {
        "width": 300,
        "height": {"step": 18},
        "data": {"values": data},
        "encoding": {"y": _runs(runs), **encoding, **_TIP},
        **marks,
    }


def _number(field: str, title: str, **more: Any) -> Spec:
    axis = {"title": title, "tickCount": 5, **more.pop("axis", {})}
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def _runs(runs: Sequence[RunSeries], *, shows_names: bool = True) -> Spec:
    axis = {"title": None, "ticks": False, "domain": False} if shows_names else None
    return {"field": "run", "type": "nominal", "sort": [run.name for run in runs], "axis": axis}
