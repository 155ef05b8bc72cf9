"""What the notebook shows of a whole run: its settings, the rows behind it, and its verdict."""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from config import Config
from quantpref import prompts
from quantpref.baselines import popularity
from quantpref.browse import OTHER, PREFERRED, SOFT, Run, table
from quantpref.comparisons import Comparison, counterbalance
from quantpref.figures import COLOURS, INK, STYLE, WIDTH_INCHES
from quantpref.report import warning
from quantpref.sections import name_of, sections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer(run: Run) -> "PreTrainedTokenizerBase | None":
    """The tokenizer saved beside the adapters, or the local base's; None where only the results are here."""
    from transformers import AutoTokenizer

    for folder in (run.config.sft_folder, run.config.dpo_folder, Path(run.config.base_model)):
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return None


def example(comparison: Comparison, found: "PreTrainedTokenizerBase | None", config: Config) -> HTML:
    """Prompt, chosen and rejected response, token by token (word by word without a tokenizer)."""
    prompt = prompts.prompt(comparison)
    chosen, rejected = (
        _pieces(found, prompt, write(comparison, config.response)) for write in (prompts.chosen, prompts.rejected)
    )
    slot = next(i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r)
    shaded = _shaded(_pieces(found, "", prompt))
    rows = [("prompt", shaded), ("chosen", _shaded(chosen, slot)), ("rejected", _shaded(rejected, slot))]
    parts = "".join(
        f'<div style="margin:.7em 0 .2em"><b>{name}</b></div><div style="font-family:monospace;white-space:pre-wrap;'
        f'overflow-wrap:anywhere;line-height:1.7">{text}</div>'
        for name, text in rows
    )
    return HTML(f'<div style="max-width:58em">{parts}</div>')


def _pieces(found: "PreTrainedTokenizerBase | None", before: str, text: str) -> list[str]:
    """`text` in the pieces that the model reads it in, tokenised after `before`."""
    if found is None:
        return re.findall(r"\w+|\W+", text)
    offsets = found(before + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A character of several tokens is shown once, at its first.
    ends = np.maximum.accumulate([len(before), *(end for _, end in offsets)])
    whole = before + text
    return [whole[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True) if b > a]


def _shaded(pieces: Sequence[str], slot: int | None = None) -> str:
    styles = ["background:" + SOFT, ""]
    marked = f"background:{OTHER};color:#000;font-weight:bold;padding:0 .2em;border-radius:.2em"
    return "".join(
        f'<span style="{marked if i == slot else styles[i % 2]}">{html.escape(piece)}</span>'
        for i, piece in enumerate(pieces)
    )


def rows_figure(comparisons: Sequence[Comparison], found: "PreTrainedTokenizerBase | None") -> Figure:
    """Prompt lengths, and how often each genre stands on the preferred and on the other film."""
    texts = [prompts.prompt(c) for c in comparisons]
    if found:
        bos = found.bos_token_id is not None
        lengths = [bos + len(ids) for ids in found(texts, add_special_tokens=False)["input_ids"]]
    else:
        lengths = [len(text.split()) for text in texts]
    genres = Counter(g for c in comparisons for m in (c.preferred, c.other) for g in m.genres)
    names = [name for name, _ in genres.most_common(20)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(1.4 * WIDTH_INCHES, 0.9 + 0.17 * max(10, len(names))),
            layout="constrained",
            label="prompt lengths, and genres of the two films",
        )
        left, right = figure.subplots(ncols=2)
        step = max(1, (max(lengths) - min(lengths)) // 30)
        edges = np.arange(min(lengths), max(lengths) + step + 1, step) - 0.5
        left.hist(lengths, bins=edges.tolist(), color=INK, alpha=0.6, rwidth=0.9)
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.set(xlabel=f"Prompt length ({'tokens' if found else 'words'})", ylabel="Comparisons")
        for label, colour, films in (
            ("preferred film", PREFERRED, [c.preferred for c in comparisons]),
            ("other film", OTHER, [c.other for c in comparisons]),
        ):
            shares = [100 * np.mean([name in film.genres for film in films]) for name in names]
            right.plot(shares, range(len(names)), "o", color=colour, ms=5, label=label)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set_xlim(left=0)
        right.set_xlabel("Films with this genre (%)")
        right.legend(loc="lower right")
    return figure


def shortcuts_figure(run: Run) -> Figure:
    """Where the preferred film stands, and how much better known it is than the other one."""
    train, test = run.data.split.train, run.test
    balance = {
        "in the file": run.data.manifest["labels_a"] / run.data.manifest["comparisons"],
        "in training": float(np.mean([c.label == "A" for c in counterbalance(train, run.config.seed)])),
        "in the test": 0.5,  # each comparison in both orders
    }
    ratios = popularity_ratios(train, test)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.4 * WIDTH_INCHES, 2.5), layout="constrained", label="label balance and popularity")
        left, right = figure.subplots(ncols=2)
        left.barh(list(balance), [100 * x for x in balance.values()], height=0.55, color=INK, alpha=0.6)
        for y, share in enumerate(balance.values()):
            left.annotate(f"{share:.1%}", (100 * share, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
        left.axvline(50, color=INK, lw=0.8, ls=":")
        left.set(xlim=(0, 118), xticks=range(0, 101, 25), xlabel="Preferred film is option A (%)")
        left.invert_yaxis()
        widest = float(np.clip(np.ceil(np.quantile(np.abs(ratios), 0.995)), 1, 6))
        edges = (np.linspace(-1, 1, 42) * widest).tolist()
        for side, colour in ((ratios > 0, PREFERRED), (ratios < 0, OTHER), (ratios == 0, "#7F7F7F")):
            right.hist(np.clip(ratios[side], -widest, widest), bins=edges, color=colour)
        texts = ((0.02, "left", f"other better\nknown: {np.mean(ratios < 0):.0%}"),
                 (0.98, "right", f"preferred better\nknown: {np.mean(ratios > 0):.0%}"))  # fmt: skip
        for x, side, text in texts:
            right.text(x, 0.97, text, transform=right.transAxes, ha=side, va="top", fontsize=8)
        right.margins(y=0.35)
        right.set(xlabel="log₂ (preferred seen + 1) / (other seen + 1)", ylabel="Test comparisons")
    return figure


def popularity_ratios(train: Sequence[Comparison], test: Sequence[Comparison]) -> NDArray[np.float64]:
    """(n_test,): log2 of how many training users saw the preferred film, against the other, each plus one."""
    share = popularity(train)
    seen = np.array([(share(c, c.preferred), share(c, c.other)) for c in test]) * len(train)
    return np.diff(np.log2(np.rint(seen) + 1))[:, 0] * -1


def baselines_table(run: Run) -> HTML:
    """Test accuracy of the rules that know only the training rows, with its interval."""
    rows = [
        [html.escape(name_of(name)), f"{row['accuracy']:.1%}", " to ".join(f"{x:.1%}" for x in row["accuracy_ci95"])]
        for name, row in run.results["baselines"].items()
    ]
    return HTML(table(["Rule", "Test accuracy", "95 % interval"], rows))


def settings(run: Run) -> HTML:
    """What was compared, in a few rows; the report has every setting."""
    c, results = run.config, run.results
    rows = {
        "Run": f"{run.folder}, seed {c.seed}, on {results['environment']['device']}",
        "Base": f"{results['base']['model']}, 4-bit {results['base']['quantisation']['type']}",
        "Data": f"{c.data.name}: {results['data']['n_train']:,} comparisons to train on,"
        f" {results['data']['n_validation']:,} for validation, {len(run.test):,} to test on",
        "SFT": f"{c.sft_epochs} epoch(s) at {c.sft_learning_rate:g}, LoRA of rank {c.lora_r}",
        "DPO": f"{c.num_train_epochs} epoch(s) at {c.learning_rate:g}, beta {c.beta:g}, starting from SFT",
        "Arms": ", ".join(map(name_of, run.arms)),
    }
    return HTML(table(["", ""], [[f"<b>{key}</b>", html.escape(text)] for key, text in rows.items()]))


def tables(run: Run, title: str) -> HTML:
    """The tables of one of the report's sections."""
    found = [t for section in sections(run.results) if section.title == title for t in section.tables]
    return HTML("".join(table(t.head, [[html.escape(cell) for cell in row] for row in t.rows]) for t in found))


def verdict_box(results: Mapping[str, Any]) -> HTML:
    """Outcome, what a reader in a hurry must not miss, and the reasons."""
    verdict, warned = results["verdict"], warning(dict(results))
    note = f"<p><b>{html.escape(warned)}</b></p>" if warned else ""
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict["reasons"])
    return HTML(
        f'<div style="border-left:.4em solid {COLOURS["dpo"]};padding:.1em 1em;max-width:52em">'
        f'<p style="font-size:1.4em"><b>VERDICT: {html.escape(verdict["outcome"])}</b></p>{note}'
        f"<ul>{reasons}</ul></div>"
    )
