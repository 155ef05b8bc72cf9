"""What the notebook shows beyond the report: a run, single comparisons, and answers to your own history."""

import contextlib
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import matplotlib
import numpy as np
from IPython.display import HTML, Image
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import expit

from config import ROOT, Config
from quantpref.comparisons import INSTRUCTION, Comparison, parse_line
from quantpref.experiment import Data, check_adapter, load_data
from quantpref.figures import INK, PNG_DPI, STYLE, colours
from quantpref.metrics import flipped, read_predictions
from quantpref.report import check
from quantpref.runs import RunError, UserError, damage, read_json, sha256
from quantpref.scoring import Scores, score, scoring_rows
from quantpref.sections import arm_order, name_of

if TYPE_CHECKING:
    from ipywidgets import Widget
    from transformers import PreTrainedTokenizerBase

PIXELS_PER_INCH = 115  # of a figure on the page
PREFERRED, OTHER = "#009E73", "#E69F00"  # of figures' palette, apart from the arms' colours
SOFT = "rgba(128,128,128,.25)"  # lines and fills that a dark page shows too


class Stop(Exception):
    """Ends the notebook with one line where a traceback would stand."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn what a user can cause into `Stop`."""
    try:
        yield
    except (UserError, RunError) as error:
        raise Stop(str(error)) from None


@dataclass(frozen=True)
class Run:
    """A finished run: results.json, the data behind it, and every arm's scores of the test."""

    folder: Path
    results: dict[str, Any]
    config: Config
    data: Data
    scores: dict[str, Scores]  # in the order of data.split.test

    @property
    def test(self) -> list[Comparison]:
        return self.data.split.test

    @property
    def arms(self) -> list[str]:
        return arm_order(self.results)


@one_line()
def open_run(folder: Path) -> Run:
    """Read a finished run; `Stop` says what to do where it is not there or its data is not the same."""
    evaluation = folder / "evaluation"
    if not (evaluation / "results.json").is_file():
        raise UserError(
            f"No finished run in {folder}: run `python train_dpo.py --preset tiny --output-dir {folder}`, then"
            " `python evaluate_dpo.py` with the same flags; or set QUANTPREF_RUN to the folder of another run."
        )
    if fault := damage(evaluation):
        raise UserError(f"{fault}; restore it, or run evaluate_dpo.py again")
    results = read_json(evaluation / "results.json")
    check(results)
    predictions = evaluation / "predictions.parquet"
    if not predictions.is_file():
        raise UserError(f"{predictions}: not found; of several runs' aggregate, set QUANTPREF_RUN to one of the runs.")
    config = rebuilt_config(results["config"], folder)
    data = load_data(config)
    if (data.manifest["sha256"], sha256(data.test_file)) != (results["data"]["sha256"], results["data"]["test_sha256"]):
        raise UserError(f"{data.test_file}: is not the file that {folder} was made with; restore it")
    return Run(folder, results, config, data, read_predictions(predictions, data.split.test))


def rebuilt_config(values: Mapping[str, Any], folder: Path) -> Config:
    """The settings of a run, with its folder and files where they stand now."""
    types: dict[str, Any] = {field.name: field.type for field in fields(Config)}
    if unknown := values.keys() - types.keys():
        raise UserError(f"{folder}: made by another version, with settings unknown here: {', '.join(sorted(unknown))}")
    typed = {name: _typed(value, types[name]) for name, value in values.items()}
    config = replace(Config(), **typed | {"output_dir": folder})
    base = _here(Path(config.base_model))  # a hub id is no folder
    return replace(config, base_model=str(base)) if base.is_dir() else config


def _typed(value: Any, kind: Any) -> Any:
    """JSON knows neither paths nor tuples."""
    if get_origin(kind) is tuple:
        return tuple(_typed(item, get_args(kind)[0]) for item in value)
    return _here(Path(value)) if value is not None and Path in (kind, *get_args(kind)) else value


def _here(path: Path) -> Path:
    """A file of the checkout that made the run, found in this one; hashes tell later whether it is the same."""
    here = ROOT / path.parent.name / path.name
    return here if not path.exists() and here.exists() else path


def image(figure: Figure | None) -> Image | HTML:
    """A figure as a PNG on the page; a line where results.json lacks its numbers."""
    if figure is None:
        return HTML("<p>This run holds no numbers for that figure.</p>")
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, dpi=PNG_DPI, metadata={"Software": None})
    width = round(PIXELS_PER_INCH * figure.get_figwidth())
    return Image(buffer.getvalue(), width=width, alt=f"Figure: {figure.get_label()}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already, and whose heads are text."""
    cell = f'style="border-bottom:1px solid {SOFT};padding:.3em .8em .3em 0;text-align:'
    lines = ["".join(f'<th {cell}left">{html.escape(text)}</th>' for text in head)] if any(head) else []
    lines += ["".join(f'<td {cell}left">{text}</td>' for text in row) for row in rows]
    body = "".join(f'<tr style="background:none">{line}</tr>' for line in lines)
    return f'<table style="border-collapse:collapse;margin:.5em 0">{body}</table>'


# --- single comparisons ------------------------------------------------------------------------------


def card(
    comparison: Comparison, margins: Mapping[str, NDArray[np.float64]], palette: Mapping[str, str], known: bool = True
) -> str:
    """One comparison with each arm's probabilities, as HTML; all text of others is escaped.

    margins: (2,) an arm, nats in favour of the preferred film where it stands first and second. Where it is
    not `known` which film is preferred, option A takes its place.
    """
    roles = ("preferred", "other") if known else ("first film", "second film")
    films = dict(zip(roles, (comparison.preferred, comparison.other), strict=True))
    history = "".join(f"<li>{html.escape(str(movie))}</li>" for movie in comparison.history)
    options = "".join(
        f"<div><b>{role}:</b> {html.escape(f'{movie} ({movie.genre_text})')}</div>" for role, movie in films.items()
    )
    head = ["", f"P({roles[0]}) as option A", "as option B", "both orders", "chooses"]
    rows = []
    for arm, (first, second) in margins.items():
        both = (first + second) / 2
        bars = [_bar(float(expit(m)), palette[arm]) for m in (first, second, both)]
        choice = "tie" if both == 0 else html.escape(str(comparison.preferred if both > 0 else comparison.other))
        mark = (" ✓" if both > 0 else " ✗") if known and both else ""
        rows.append([html.escape(name_of(arm)), *bars, choice + mark])
    where = f"<b>Comparison {comparison.line}</b>" if comparison.line else ""
    return (
        f'<div style="max-width:58em;line-height:1.5">{where}<div>Watched, oldest first:</div>'
        f'<ol style="margin:.2em 0">{history}</ol>'
        f"{options}{table(head, rows)}</div>"
    )


def _bar(share: float, colour: str) -> str:
    """A percentage over a bar of that length; the tick in its middle is 50 %."""
    fill = f'<div style="width:{100 * share:.1f}%;height:100%;background:{colour}"></div>'
    tick = f'<div style="position:absolute;left:50%;top:-2px;bottom:-2px;border-left:1px solid {INK}"></div>'
    return f'{share:.1%}<div style="position:relative;width:7em;height:.4em;background:{SOFT}">{fill}{tick}</div>'


def selections(scores: Mapping[str, Scores]) -> dict[str, list[int]]:
    """Rows of the test by how SFT and DPO fared, those first in which their probabilities differ most."""
    sft, dpo = scores["sft"].margins, scores["dpo"].margins
    order = np.argsort(-np.abs(expit(dpo) - expit(sft)), kind="stable")
    chosen = {
        "all": np.ones(len(sft), dtype=bool),
        "SFT wrong, DPO right": (sft < 0) & (dpo > 0),
        "SFT right, DPO wrong": (sft > 0) & (dpo < 0),
        "both wrong": (sft < 0) & (dpo < 0),
        "both right": (sft > 0) & (dpo > 0),
        "SFT changes its mind with the order": flipped(scores["sft"]),
        "DPO changes its mind with the order": flipped(scores["dpo"]),
    }
    return {name: [int(i) for i in order if mask[i]] for name, mask in chosen.items()}


def show_comparison(run: Run, row: int) -> str:
    margins = {arm: run.scores[arm].order_margins[row] for arm in run.arms}
    return card(run.test[row], margins, colours(run.results))


def browser(run: Run) -> "Widget | HTML":
    """A filter and a slider over the test; the first comparison alone where widgets do not run."""
    import ipywidgets

    if "dpo" not in run.scores:
        return HTML(show_comparison(run, 0))
    rows = selections(run.scores)

    class Browser(ipywidgets.VBox):
        def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
            note = "<p><i>Filter and slider need a running notebook; this is the comparison they start with.</i></p>"
            return super()._repr_mimebundle_(**options) | {"text/html": note + show_comparison(run, rows["all"][0])}

    which = ipywidgets.Dropdown(
        options=[(f"{name} ({len(r):,})", name) for name, r in rows.items()], description="Show"
    )
    place = ipywidgets.IntSlider(1, 1, len(rows["all"]), description="Number", layout={"width": "36em"})
    page = ipywidgets.HTML()

    def turn(_: Any = None) -> None:
        found = rows[which.value]
        page.value = show_comparison(run, found[place.value - 1]) if found else "<p>There is none.</p>"

    def choose(_: Any) -> None:
        place.value, place.max = 1, max(1, len(rows[which.value]))
        turn()

    which.observe(choose, "value")
    place.observe(turn, "value")
    turn()
    return Browser([which, place, page])


# --- your own history --------------------------------------------------------------------------------


@one_line()
def own_comparison(history: str, option_a: str, option_b: str) -> Comparison:
    """Films as text, one a line in the history, read and checked as a line of the data is."""
    films = ", ".join(line.strip() for line in history.strip().splitlines())
    text = f"History: {films}. Option A: {option_a.strip()}. Option B: {option_b.strip()}."
    try:
        row = {"instruction": INSTRUCTION, "input": text, "output": "Option A"}
        return replace(parse_line(json.dumps(row).encode(), 1), line=0)
    except ValueError as error:
        raise UserError(f"Your films: {error}") from None


def unknown_films(run: Run, comparison: Comparison) -> list[str]:
    """Films that no training row names: an adapter can know them from its base at most."""
    known = {str(m) for c in run.data.split.train for m in (*c.history, c.option_a, c.option_b)}
    return [str(m) for m in (*comparison.history, comparison.option_a, comparison.option_b) if str(m) not in known]


def can_answer(run: Run) -> bool:
    """Whether base and adapters are here: a local base or a GPU, so that nothing is fetched by surprise."""
    import torch

    adapters = (run.config.sft_folder, run.config.dpo_folder)
    return all(f.is_dir() for f in adapters) and (Path(run.config.base_model).is_dir() or torch.cuda.is_available())


@one_line()
def load_arms(run: Run) -> "tuple[Any, PreTrainedTokenizerBase] | None":
    """The 4-bit base with the very SFT and DPO adapters that were evaluated; None where they are not here."""
    if not can_answer(run):
        return None
    from quantpref.backends import choose_backend

    backend = choose_backend(run.config.backend)
    from quantpref import models
    from quantpref.packed_llama import PackedLlama

    models.quiet()
    base = models.load_base(run.config.base_model, run.config.base_revision, backend, run.config.max_length)
    evaluated, adapters = run.results.get("identity", {}).get("adapters", {}), {}
    for arm, folder in (("sft", run.config.sft_folder), ("dpo", run.config.dpo_folder)):
        check_adapter(folder, base.manifest(), run.data)
        adapters[arm] = models.read_adapter(folder)
        if adapters[arm].sha256 != evaluated.get(arm):
            raise UserError(f"{folder}: is not the adapter that was evaluated; run evaluate_dpo.py again")
    return PackedLlama(models.attach(base, adapters)), base.tokenizer


@one_line()
def own_answer(run: Run, arms: "tuple[Any, PreTrainedTokenizerBase] | None", comparison: Comparison) -> HTML:
    """What base, SFT and DPO say of a comparison in both orders, or why they cannot."""
    if arms is None:
        return HTML(
            "<p>Neither a local base nor a GPU, or not this run's adapters, are here, so nothing was loaded. All that"
            " stands above needs no model.</p>"
        )
    llama, found = arms
    rows = scoring_rows(found, [comparison], run.config.max_length, run.config.response)
    margins = {}
    for arm in ("base", "sft", "dpo"):
        llama.adapters.use(None if arm == "base" else arm)
        margins[arm] = score(llama, rows).order_margins[0]
    unknown = html.escape(", ".join(unknown_films(run, comparison)))
    note = f"<p>In no training row, so expect little of them: {unknown}.</p>" if unknown else ""
    return HTML(card(comparison, margins, colours(run.results), known=False) + note)
