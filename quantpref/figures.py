"""The report's figures, from results.json alone: PNG and PDF for a thesis, SVG for report.html.

Matplotlib's objects without pyplot, no dates and a fixed salt: the same results give the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from quantpref.sections import CONTROLS, arm_order, control_of, control_rows, name_of

# Okabe & Ito (2008), safe for colour-blind readers; the grey is ours. An arm has its colour everywhere.
COLOURS = {
    "base": "#7F7F7F",
    "sft": "#0072B2",
    "sft-more": "#56B4E9",
    "dpo": "#D55E00",
    "dpo-from-base": "#CC79A7",
}
SPARE_COLOURS = ("#009E73", "#E69F00", "#F0E442")  # further adapters, in the order of results.json
LINES = {"base": ":", "sft": "-", "sft-more": "--", "dpo": "-"}  # so that grey print tells arms apart too
MARKERS = {"base": "s", "sft": "o", "sft-more": "D", "dpo": "^"}

PNG_DPI = 200
WIDTH_INCHES = 4.8  # the text width of a LaTeX article; more than a CSS pixel a point on a phone
INK, PAPER = "#1C1C20", "#FDFDFC"  # svg() hands both to the page, so that they follow its theme
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "font.family": "DejaVu Sans",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.facecolor": "none",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": INK, "grid.alpha": 0.13, "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.07, "figure.constrained_layout.h_pad": 0.07, "figure.facecolor": PAPER,
    "svg.hashsalt": "quantpref", "svg.fonttype": "path", "pdf.fonttype": 42,
    "text.hinting": "none",  # as wide at any resolution
    "text.parse_math": False,  # a "$" in a name is a dollar
}  # fmt: skip


def draw(results: dict[str, Any]) -> dict[str, Figure]:
    """Every figure whose numbers results.json holds, by name, in the report's order."""
    makers = {
        "accuracy": _accuracy,
        "controls": _controls,
        "training": _training,
        "confidence": _confidence,
        "reliability": _reliability,
        "position": _position,
        "slices": _slices,
    }
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, maker in makers.items():
            figure = maker(results)
            if figure is not None:
                figure.set_label(name)
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # PNG, PDF and SVG share one layout
                figures[name] = figure
    return figures


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """NAME.png (200 dpi) and NAME.pdf (vector, fonts embedded) in the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=PNG_DPI, metadata={"Software": None})
            dateless = {"CreationDate": None, "Creator": None, "Producer": None}
            figure.savefig(folder / f"{name}.pdf", metadata=dateless)


def svg(figure: Figure) -> str:
    """The figure as inline SVG: no header, its ids its own, as wide as its place, in the page's ink."""
    buffer, label = io.StringIO(), str(figure.get_label())
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{label}-", text)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r'<svg\1 role="img" aria-hidden="true"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(INK.lower(), "currentColor").replace(PAPER.lower(), "var(--paper, #fff)")


def colours(results: Mapping[str, Any]) -> dict[str, str]:
    """Colour by arm: COLOURS, and the spare ones for arms that it does not know."""
    unknown = [arm for arm in results["arms"] if arm not in COLOURS]
    return COLOURS | {arm: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, arm in enumerate(unknown)}


def _figure(height_inches: float, **grid: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=PNG_DPI, layout="constrained")
    return figure, figure.subplots(**grid)


def _label(arm: str) -> str:
    return _short(name_of(arm), 22)


def _short(text: str, characters: int) -> str:
    """A long name must not push the axes off the page."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """One named row each, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def _accuracy(results: dict[str, Any]) -> Figure:
    """Forest plot: baselines, base, SFT, DPO."""
    arms, palette = results["arms"], colours(results)
    rows = [*results["baselines"].items(), *((arm, arms[arm]) for arm in arm_order(results))]
    figure, ax = _figure(0.75 + 0.24 * len(rows))
    for y, (name, row) in enumerate(rows):
        low, high = (100 * x for x in row["accuracy_ci95"])
        colour = palette.get(name, INK) if name in arms else INK
        ax.plot([low, high], [y, y], color=colour, lw=1.8 if name in arms else 1, solid_capstyle="butt")
        ax.plot(100 * row["accuracy"], y, MARKERS.get(name, "o") if name in arms else "|", color=colour, ms=6)
        text = f"{row['accuracy']:.1%}  ({low:.1f}-{high:.1f})"
        weight = "bold" if name in ("sft", "dpo") else "normal"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8, weight=weight)
    ax.axvline(50, color=INK, lw=0.8, ls=":")
    ax.axhline(len(results["baselines"]) - 0.5, color=INK, lw=0.5, alpha=0.4)
    _name_rows(ax, [_label(name) for name, _ in rows])
    ax.set_xlabel("Accuracy on the test comparisons (%), 95 % interval")
    return figure


def _controls(results: dict[str, Any]) -> Figure | None:
    """Accuracy on the main test and on each control set, of popularity and of every arm."""
    controls = results.get("controls")
    if not controls:
        return None
    who, palette = control_rows(results), colours(results)
    main = results["baselines"] | results["arms"]
    figure, ax = _figure(1.2 + 0.3 * len(who))
    for y, name in enumerate(who):
        colour = palette.get(name, INK) if name in results["arms"] else INK
        at = [100 * main[name]["accuracy"], *(100 * control_of(results, c, name)["accuracy"] for c in controls)]
        ax.plot([min(at), max(at)], [y, y], color=colour, lw=1.2, alpha=0.5, zorder=1)
        for share, (marker, filled) in zip(at, _control_markers(controls).values(), strict=True):
            ax.plot(share, y, marker, color=colour, mfc=colour if filled else PAPER, ms=6)
    for label, (marker, filled) in _control_markers(controls).items():
        ax.plot([], [], marker, color=INK, mfc=INK if filled else PAPER, ms=6, label=label)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, columnspacing=1)
    ax.axvline(50, color=INK, lw=0.8, ls=":")
    _name_rows(ax, [_label(name) for name in who])
    ax.set_xlabel("Accuracy (%)")
    return figure


def _control_markers(controls: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Marker, and whether it is filled, by what the legend calls it."""
    return {"Main test": ("o", True)} | {
        CONTROLS[name]: marker for name, marker in zip(controls, (("D", False), ("o", False)), strict=False)
    }


def _training(results: dict[str, Any]) -> Figure | None:
    """Loss, reward margin and reward accuracy of every run."""
    panels = _training_panels(results)
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else 1
    rows = len(panels) // columns
    figure, axes = _figure(0.5 + 1.9 * rows, ncols=columns, nrows=rows, squeeze=False)
    palette, handles = colours(results), {}
    for ax, (label, runs, key, scale) in zip(axes.flat, panels, strict=True):
        for arm, steps in runs.items():
            handles[_label(arm)] = _curve(ax, arm, steps, key, scale, palette.get(arm, INK))
        if label.startswith("DPO loss"):
            ax.axhline(np.log(2), color=INK, lw=0.8, ls=":")
            place = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
            ax.annotate("ln 2", (1, np.log(2)), (-1, 2), fontsize=7, **place)
        ax.set(xlabel="Training step", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(3, len(handles)))
    figure.align_ylabels()
    return figure


def _training_panels(results: dict[str, Any]) -> list[tuple[str, dict[str, Any], str, float]]:
    """Label, runs, key and scale. SFT and preference runs apart: their losses have different units."""
    training = {arm: steps for arm, steps in results.get("training", {}).items() if steps}
    order = sorted(training, key=lambda arm: (arm == "dpo", arm == "sft"))  # those two are drawn on top
    preference = {arm: training[arm] for arm in order if "rewards/margins" in training[arm][0]}
    sft = {arm: training[arm] for arm in order if arm not in preference}
    panels = [
        ("SFT loss (nats/token)", sft, "loss", 1.0),
        ("DPO loss (nats/pair)", preference, "loss", 1.0),
        ("DPO reward margin (nats)", preference, "rewards/margins", 1.0),
        ("DPO reward accuracy (%)", preference, "rewards/accuracies", 100.0),
    ]
    return [panel for panel in panels if panel[1]]


def _curve(ax: Axes, arm: str, rows: Sequence[Mapping[str, Any]], key: str, scale: float, colour: str) -> Any:
    steps = [row["step"] for row in rows]
    values = scale * np.array([row.get(key) for row in rows], dtype=float)  # a missing one is nan, a gap
    ax.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
    (line,) = ax.plot(steps, smoothed(values), color=colour, lw=1.6, ls=LINES.get(arm, "-"))
    return line


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a 25th of the steps, five or more; (n,) -> (n,). Gaps do not spread."""
    window = np.ones(min(len(values), max(5, len(values) // 25)))
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), window, "same")
    counts = np.convolve(known.astype(float), window, "same")
    return np.divide(total, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def _arms_with(results: dict[str, Any], key: str) -> list[str]:
    return [arm for arm in arm_order(results) if results["arms"][arm].get(key)]


def _confidence(results: dict[str, Any]) -> Figure | None:
    """One histogram an arm on one x axis, each with its own scale: a sure arm would flatten the others."""
    arms = _arms_with(results, "confidence_histogram")
    if not arms:
        return None
    figure, axes = _figure(0.6 + 0.88 * len(arms), nrows=len(arms), sharex=True, squeeze=False)
    palette = colours(results)
    for ax, arm in zip(axes.flat, arms, strict=True):
        row = results["arms"][arm]
        counts = np.array(row["confidence_histogram"]["counts"], dtype=float)
        shares = 100 * counts / max(counts.sum(), 1)
        ax.stairs(shares, row["confidence_histogram"]["edges"], fill=True, color=palette[arm], alpha=0.75)
        ax.axvline(0, color=INK, lw=0.8, ls=":")
        ax.axvline(row["confidence"], color=INK, lw=1.2)
        ax.set_title(f"{_label(arm)}, mean {row['confidence']:.3f}", loc="left", fontsize=8)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    axes[-1, 0].set(xlim=(-1, 1), xlabel="Confidence, 2P − 1 (P: probability of the preferred film)")
    figure.supylabel("Share of comparisons (%)", fontsize=9)
    return figure


def _reliability(results: dict[str, Any]) -> Figure | None:
    """Share right against mean probability of the choice, before and after temperature scaling."""
    arms = _arms_with(results, "reliability")
    if not arms:
        return None
    figure, axes = _figure(3.1, ncols=2, sharex=True, sharey=True)
    palette = colours(results)
    for ax, (kind, title) in zip(axes, (("raw", "As trained"), ("calibrated", "Temperature scaled")), strict=True):
        ax.plot([50, 100], [50, 100], color=INK, lw=0.8, ls="--")
        for arm in arms:
            bins = results["arms"][arm]["reliability"][kind]
            leading = arm in ("sft", "dpo")
            ax.plot(
                100 * np.array(bins["confidence"]),
                100 * np.array(bins["share_right"]),
                color=palette[arm],
                ls=LINES.get(arm, "-"),
                marker=MARKERS.get(arm, "o"),
                ms=4 if leading else 2.5,
                lw=1.4 if leading else 0.9,
                alpha=1 if leading else 0.7,
                label=_label(arm),
            )
        ax.set_title(title)
    figure.supxlabel("Mean probability of the chosen film (%)", fontsize=9)
    axes[0].set(ylabel="Share right (%)", xlim=(48, 102))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4 if len(arms) <= 4 else 3, columnspacing=1,
                  handlelength=1.4)  # fmt: skip
    return figure


def _position(results: dict[str, Any]) -> Figure | None:
    """Accuracy by the preferred film's place, and the share of answers that change with the order."""
    arms = _arms_with(results, "accuracy_preferred_first")
    if not arms:
        return None
    figure, (left, right) = _figure(1.2 + 0.28 * len(arms), ncols=2, sharey=True, width_ratios=(3, 2))
    palette = colours(results)
    for y, arm in enumerate(arms):
        row = results["arms"][arm]
        first, second = 100 * row["accuracy_preferred_first"], 100 * row["accuracy_preferred_second"]
        left.plot([first, second], [y, y], color=palette[arm], lw=1.8, zorder=1)
        left.plot(first, y, "o", color=palette[arm], ms=6)
        left.plot(second, y, "o", color=palette[arm], mfc=PAPER, ms=6)
        flips = 100 * row["flip_rate"]
        right.barh(y, flips, height=0.5, color=palette[arm])
        right.annotate(f"{flips:.1f}", (flips, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    left.plot([], [], "o", color=INK, ms=6, label="preferred film first")
    left.plot([], [], "o", color=INK, mfc=PAPER, ms=6, label="preferred film second")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    left.axvline(50, color=INK, lw=0.8, ls=":")
    left.set_xlabel("Accuracy (%)")
    _name_rows(left, [_label(arm) for arm in arms])
    right.set_xlabel("Flip rate (%)")
    right.margins(x=0.18)
    right.set_xlim(left=0)
    right.grid(False, axis="y")
    return figure


def _slices(results: dict[str, Any]) -> Figure | None:
    """DPO - SFT in every slice, grouped by what the slices divide."""
    rows: list[tuple[str, Mapping[str, Any] | None]] = []
    for kind, found in results.get("slices", {}).items():
        if found:
            rows.append((kind[:1].upper() + kind[1:], None))
            rows += [(f"{_short(str(row['slice']), 34)} (n = {row['n']:,})", row) for row in found]
    if not rows:
        return None
    figure, ax = _figure(0.6 + 0.19 * len(rows))
    colour = colours(results)["dpo"]
    for y, (_, row) in enumerate(rows):
        if row and row["difference_pp"] is not None:
            if row.get("ci95_pp"):
                ax.plot(row["ci95_pp"], [y, y], color=colour, lw=1.4, solid_capstyle="butt")
            ax.plot(row["difference_pp"], y, MARKERS["dpo"], color=colour, ms=4.5)
    ax.axvline(0, color=INK, lw=0.8)
    _name_rows(ax, [label for label, _ in rows])
    for label, (_, row) in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_weight("normal" if row else "bold")
    figure.supxlabel("Accuracy, DPO − SFT (percentage points), 95 % interval", fontsize=9)
    return figure
