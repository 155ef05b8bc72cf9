"""results.json in words: the printed table, report.md and report.html, from results.json alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantpref.runs import UserError
from quantpref.sections import Section, Table, arm_order, name_of, sections
from quantpref.verdict import NULL_WARNING, p_text

TEMPLATE = Path(__file__).with_name("report.html.jinja")

# Paths that the report needs. "*": every entry; "?": may be absent, but what follows may not.
REQUIRED = (
    "verdict.outcome", "verdict.reasons", "verdict.difference_pp", "verdict.ci95_pp", "verdict.p_value",
    "arms.sft", "arms.*.accuracy", "arms.*.accuracy_ci95", "arms.*.confidence",
    "baselines.*.accuracy", "baselines.*.accuracy_ci95",
    "data.n_test", "data.users_test", "data.test_file", "data.sha256",
    "base.model", "base.fingerprint", "config.seed", "environment.device",
    *(f"controls?.*.{kind}.*.{key}" for kind in ("arms", "baselines")
      for key in ("accuracy", "main_accuracy", "main_less_control_pp", "ci95_pp")),
    "controls?.*.n", "training?.*.*.step", "training?.*.*.loss",
    *(f"arms.*.reliability?.{kind}.{key}" for kind in ("raw", "calibrated") for key in ("confidence", "share_right")),
    "arms.*.confidence_histogram?.edges", "arms.*.confidence_histogram?.counts",
    *(f"slices?.*.*.{key}" for key in ("slice", "n", "sft", "dpo", "difference_pp")),
    *(f"disagreements?.*.{key}" for key in
      ("comparison", "history", "option_a", "option_b", "preferred", "p_sft", "p_dpo")),
    *(f"secondary_tests?.*.{key}" for key in ("test", "difference", "p_value", "p_holm")),
    *(f"reasoning_check?.*.{key}" for key in ("n", "form", "agrees", "exact_genres")),
)  # fmt: skip


def check(results: Any) -> None:
    """UserError that names the first key which the report needs and results.json lacks."""
    for path in REQUIRED:
        missing = _missing(results, path.split("."), "")
        if missing:
            raise UserError(
                f"results.json: lacks {missing}, so it comes from another version; run evaluate_dpo.py again with an"
                " empty evaluation folder"
            )


def _missing(value: Any, path: Sequence[str], walked: str) -> str | None:
    """The first place on `path` that `value` lacks, as a dotted name."""
    if not path:
        return None
    key, optional = path[0].removesuffix("?"), path[0].endswith("?")
    if key == "*":
        entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
        if entries is None:
            return f"entries in {walked.rstrip('.')}"
        return next((m for k, v in entries if (m := _missing(v, path[1:], f"{walked}{k}."))), None)
    if not isinstance(value, Mapping) or key not in value:
        return None if optional and isinstance(value, Mapping) else f"{walked}{key}"
    return _missing(value[key], path[1:], f"{walked}{key}.")


def table(results: dict[str, Any]) -> str:
    """The table of EXPERIMENT.md: base and baselines above, SFT and DPO last."""
    head, *rows = _cells(results)
    lines = [f"{head[0]:<18} {head[1]:<23} {head[2]:<11} {head[3]}"]
    lines += [f"{name:<18} {accuracy:<23} {confidence:<11} {gain}" for name, accuracy, confidence, gain in rows]
    if results["verdict"].get("sft_training_rows_known") is False:
        lines.append("The test may be contaminated: nobody knows which rows the SFT adapter was trained on.")
    return "\n".join(lines)


def _cells(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    cells = [("Model", "Accuracy (95% CI)", "Confidence", "Improvement")]
    arms = results["arms"]
    for name, row in [*results["baselines"].items(), *((arm, arms[arm]) for arm in arm_order(results))]:
        low, high = (100 * x for x in row["accuracy_ci95"])
        accuracy = f"{row['accuracy']:.2%} ({low:.1f}-{high:.1f})"
        confidence = f"{row['confidence']:.4f}" if "confidence" in row else "-"
        cells.append((name_of(name), accuracy, confidence, _improvement(name, results)))
    return cells


def _improvement(name: str, results: dict[str, Any]) -> str:
    if name != "dpo" or results["verdict"]["p_value"] is None:
        return "-"
    verdict = results["verdict"]
    return f"{verdict['difference_pp']:+.2f} pp ({p_text(verdict['p_value'])})"


def verdict_text(results: dict[str, Any]) -> str:
    verdict = results["verdict"]
    return "\n".join([f"VERDICT: {verdict['outcome']}", *(f"  - {reason}" for reason in verdict["reasons"])])


def warning(results: dict[str, Any]) -> str | None:
    """What a reader in a hurry must not miss: PARTIALLY SUPPORTED without significance says next to nothing."""
    verdict = results["verdict"]
    if verdict["outcome"] != "PARTIALLY SUPPORTED" or verdict["p_value"] is None or verdict["p_value"] < 0.05:
        return None
    return f"{NULL_WARNING[:1].upper()}{NULL_WARNING[1:]}."


def markdown(results: dict[str, Any]) -> str:
    """report.md: the verdict on top, the table, every arm's numbers, and what was run.

    Its figures are looked for in figures/ beside it.
    """
    check(results)
    warned = warning(results)
    parts = [
        f"# DPO against SFT in 4-bit recommendation: {results['verdict']['outcome']}",
        *([f"**{warned}**"] if warned else []),
        f"```\n{table(results)}\n\n{verdict_text(results)}\n```",
        *(_markdown_section(section) for section in sections(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_section(section: Section) -> str:
    parts = [f"## {section.title}", *section.notes]
    if section.figure:
        parts.append(f"![{section.title}](figures/{section.figure}.png)")
    parts += [_markdown_table(t) for t in section.tables]
    parts += [_markdown_film(film) for film in section.films]
    return "\n\n".join(parts)


def _markdown_table(found: Table) -> str:
    lines = [f"| {' | '.join(map(_escaped, found.head))} |", f"| --- |{' ---: |' * (len(found.head) - 1)}"]
    lines += [f"| {' | '.join(map(_escaped, row))} |" for row in found.rows]
    return "\n".join([*([f"### {_escaped(found.title)}", ""] if found.title else []), *lines])


def _markdown_film(film: Mapping[str, Any]) -> str:
    options = [
        f"  - Option {label}: {_escaped(film[f'option_{label.lower()}'])}"
        + (" **(preferred)**" if film["preferred"] == label else "")
        for label in "AB"
    ]
    head = (
        f"- Comparison {film['comparison']}: probability of the preferred film {film['p_sft']:.1%} (SFT), "
        f"{film['p_dpo']:.1%} (DPO)"
    )
    return "\n".join([head, f"  - History: {_escaped(', '.join(film['history']))}", *options])


def _escaped(text: Any) -> str:
    """Text of others as Markdown shows it, whatever it holds: no tag, no table cell, no link."""
    entities = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(entities.split()))


def html(results: dict[str, Any], figures: Mapping[str, str]) -> str:
    """report.html, self-contained: no script, nothing from elsewhere, all text escaped.

    figures: by the names of figures.draw, inline SVG of figures.svg, or a base64 "data:image/png" address.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from quantpref.figures import colours

    check(results)
    verdict = results["verdict"]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {name: Markup(text) if text.startswith("<svg") else text for name, text in figures.items()}  # noqa: S704
    head, *rows = _cells(results)
    return environment.get_template(TEMPLATE.name).render(
        verdict=verdict,
        p=None if verdict["p_value"] is None else p_text(verdict["p_value"]),
        warning=warning(results),
        table=Table(head, rows),
        sections=sections(results),
        figures=images,
        swatches={name_of(arm): colour for arm, colour in colours(results).items()},
        colours=colours(results),
        leading=(name_of("sft"), name_of("dpo")),
    )
