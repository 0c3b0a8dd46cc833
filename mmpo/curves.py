"""The run report's curves: metrics of log.jsonl over steps, as inline SVG that follows the page's light and dark colours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, TypeGuard

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = Mapping[str, Any]
Series = tuple[np.ndarray, np.ndarray]  # steps and values, each (N,)

POINTS = 40  # points per curve; more are averaged in groups, and the caption says so

# Placeholder colours for matplotlib; the page's CSS variables take their place in the SVG.
INK, RULE, BLUE, ORANGE, GREEN, PURPLE = (f"#00000{i}" for i in range(1, 7))
CSS = {INK: "muted", RULE: "rule", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmpo",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Curve:
    """One drawing of the page: inline SVG, its heading, and what to look for in it."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """A drawing of metrics. lines: (key, label, colour). rest: level of the dashed line, where nothing was learnt.

    event: the records that hold them. points: as POINTS, for this panel.
    """

    name: str
    title: str
    caption: str
    lines: tuple[tuple[str, str, str], ...]
    rest: float | None
    event: str = "train"
    points: int = POINTS


PANELS = (
    Panel(
        "margin",
        "Margin on held-out pairs",
        "By how many nats the chosen side has gained on the rejected one, against the reference. Dashed: nothing was learnt.",
        (("eval/margin", "margin", BLUE),),
        0.0,
        "eval",
    ),
    Panel(
        "drift",
        "Drift on held-out pairs",
        "How far each side fell below the reference, in nats. When both rise by more than the margin, both are being unlearnt.",
        (("eval/drift_chosen", "chosen", GREEN), ("eval/drift_rejected", "rejected", ORANGE)),
        0.0,
        "eval",
    ),
    Panel(
        "fell",
        "Held-out answers that became less likely",
        "Share of pairs whose chosen answer is less likely than under the reference, and of those both of whose answers are.",
        (("eval/fell_chosen", "chosen", GREEN), ("eval/fell_both", "both", ORANGE)),
        None,
        "eval",
    ),
    Panel(
        "confidence",
        "Confidence on held-out answers",
        "Entropy over the 10 likeliest tokens, in nats per token of the chosen answers. A lasting fall that the judge does not "
        "reward is over-optimisation.",
        (("eval/top_entropy", "entropy", PURPLE),),
        None,
        "eval",
    ),
    Panel(
        "kl",
        "Distance from the reference",
        "KL from the reference of fresh answers, in nats per answer: what the reward was paid with.",
        (("eval/kl", "KL", ORANGE),),
        0.0,
        "eval",
    ),
    Panel(
        "diversity",
        "Diversity",
        "Mean distance between generations of one prompt under different seeds. When it falls, they are growing alike.",
        (("eval/diversity", "diversity", PURPLE),),
        None,
        "eval",
    ),
    Panel(
        "loss", "Loss", "Dashed: log 2, where a DPO policy agrees with its reference.", (("loss", "loss", BLUE),), math.log(2)
    ),
    Panel(
        "rewards",
        "Rewards",
        "Implicit rewards. A healthy run pulls the two sides apart; when both fall, the model moves away from its own data.",
        (("rewards/chosen", "chosen", GREEN), ("rewards/rejected", "rejected", ORANGE)),
        0.0,
    ),
    Panel(
        "accuracy",
        "Training pairs",
        "Share of a batch whose chosen side has the higher reward. Dashed: chance.",
        (("rewards/accuracies", "accuracy", BLUE),),
        0.5,
    ),
    Panel(
        "buckets",
        "Training pairs by timestep",
        "The same by quarter of the noise schedule, from nearly clean (t0) to nearly noise (t3). Dashed: chance.",
        tuple((f"t{i}/accuracies", f"t{i}", colour) for i, colour in enumerate((GREEN, BLUE, PURPLE, ORANGE))),
        0.5,
        points=12,  # a step holds only a few pairs of each quarter
    ),
)


def curves(records: Sequence[Record], summary: Record) -> list[Curve]:
    """Every drawing the log has data for, in the order of the page."""
    with mpl.rc_context(STYLE):
        drawn = [over_optimisation(records, summary), win_rate(records, summary)]
        drawn += [draw(records, panel) for panel in PANELS]
    return [curve for curve in drawn if curve is not None]


def over_optimisation(records: Sequence[Record], summary: Record) -> Curve | None:
    """The judge and the pair accuracy over steps in one frame: when they part, the run is optimising the wrong thing."""
    judge, accuracy = series(records, "eval", "eval/judge"), series(records, "eval", "eval/pair_accuracy")
    if not len(judge[0]) and not len(accuracy[0]):
        return None
    figure, axes = _frame()
    axes.plot(*judge, color=GREEN, marker="o")
    axes.set_ylabel("judge, mean score", color=GREEN)
    right = axes.twinx()
    right.grid(False)
    right.plot(*accuracy, color=BLUE, marker="s")
    right.set_ylabel("held-out pair accuracy", color=BLUE)
    caption = (
        f"Left axis: the judge ({summary.get('judge') or 'unnamed'}) on fresh generations. Right axis: held-out pairs ranked "
        "correctly. Both should rise; pair accuracy that rises while the judge falls is over-optimisation."
    )
    caption += _mark_best(axes, summary)
    svg = _svg(figure, "judge", "Judge score and held-out pair accuracy over training steps")
    return Curve("judge", "Is it getting better, or only better at the pairs?", caption, svg)


def win_rate(records: Sequence[Record], summary: Record) -> Curve | None:
    """Win rate over the base with its interval, at every evaluation."""
    rate = series(records, "eval", "eval/win_rate")
    if not len(rate[0]):
        return None
    low, high = series(records, "eval", "eval/win_low"), series(records, "eval", "eval/win_high")
    figure, axes = _frame()
    axes.axhline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    if len(low[0]) == len(high[0]) == len(rate[0]):
        axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(*rate, color=BLUE, marker="o")
    caption = "Share of comparisons with the base won, with its 95 % interval; the dashed line is a draw. These prompts choose "
    caption += "the checkpoint; the verdict comes from others."
    caption += _mark_best(axes, summary)
    return Curve("wins", "Win rate over the base", caption, _svg(figure, "wins", "Win rate over training steps"))


def draw(records: Sequence[Record], panel: Panel) -> Curve | None:
    """One panel over steps, or None when the log has none of its metrics."""
    data = [(label, colour, series(records, panel.event, key)) for key, label, colour in panel.lines]
    data = [(label, colour, points) for label, colour, points in data if len(points[0])]
    if not data:
        return None
    figure, axes = _frame()
    if panel.rest is not None:
        axes.axhline(panel.rest, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for label, colour, points in data:
        axes.plot(*thin(points, panel.points), color=colour, label=label, marker="o" if panel.event == "eval" else None)
    if len(data) > 1:
        _legend(axes)
    group = group_size(max(len(points[0]) for _, _, points in data), panel.points)
    caption = panel.caption + (f" Each point is the mean of {group} logged steps." if group > 1 else "")
    return Curve(panel.name, panel.title, caption, _svg(figure, panel.name, f"{panel.title} over training steps"))


def series(records: Iterable[Record], event: str, key: str) -> Series:
    """Steps and finite values of `key` in the records of one event."""
    points = [(r["step"], r[key]) for r in records if r.get("event") == event and "step" in r and is_number(r.get(key))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def group_size(count: int, limit: int) -> int:
    """How many neighbours one point stands for, so that there are at most `limit` points."""
    return max(1, math.ceil(count / limit))


def thin(points: Series, limit: int = POINTS) -> Series:
    """Means over groups of neighbours of one size, the last one possibly smaller: at most `limit` of them."""
    steps, values = points
    size = group_size(len(steps), limit)
    groups = [slice(i, i + size) for i in range(0, len(steps), size)]
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number; the log writes others as the strings "NaN" and "Infinity"."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _frame() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.0))
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderpad=0, handlelength=1.4)


def _mark_best(axes: Axes, summary: Record) -> str:
    best = summary.get("best_step")
    if not is_number(best):
        return ""
    axes.axvline(best, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    return f" The dotted line marks step {best}, the checkpoint that was kept."


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as inline SVG: CSS colours, identifiers unique in the page, a label for screen readers."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    for placeholder, variable in CSS.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return svg
