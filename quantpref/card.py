"""The data card beside a built file: what it was made of, how, what was dropped, and what shortcuts score on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpref.runs import write_json, write_text
from quantpref.sections import name_of, number


def card_files(data: Path) -> tuple[Path, Path]:
    """`mine.jsonl` -> `mine.card.json`, `mine.card.md`."""
    return data.with_name(f"{data.stem}.card.json"), data.with_name(f"{data.stem}.card.md")


def write_card(data: Path, card: Mapping[str, Any]) -> None:
    as_json, as_markdown = card_files(data)
    write_text(as_markdown, markdown(card))
    write_json(as_json, card)


def markdown(card: Mapping[str, Any]) -> str:
    parts = [
        f"# {card['file']}",
        f"{card['comparisons']:,} comparisons of {card['users']:,} users, SHA-256 `{card['sha256']}`.",
        "## Made from",
        _table(("File", "SHA-256"), [(name, f"`{digest}`") for name, digest in card["sources"].items()]),
        "## Made with",
        _table(("Option", "Value"), [(key, "not set" if v is None else v) for key, v in card["options"].items()]),
        "## Counts",
        _table(("Step", "Count"), [(k.replace("_", " "), f"{v:,}") for k, v in card["counts"].items()]),
        "## Control sets",
        _controls(card["controls"]),
        f"## Leakage, split by {card['options']['split']}",
        *(_leakage(card["leakage"]) if card["leakage"] else ["Too few users for a training and a test part."]),
    ]
    if card["whole_file"]:
        parts += [
            "Past and all-time popularity count all ratings by others, past ones before each comparison. Of all"
            " comparisons in the file:",
            _rules(card["whole_file"]),
        ]
    return "\n\n".join(parts) + "\n"


def _leakage(report: Mapping[str, Any]) -> list[str]:
    twins = report["duplicate_titles"]
    leaks = [f"- **{x['leak']}**: {x['count']}, such as {x['example']}" for x in report["leaks"]] or ["- none found"]
    facts = [
        f"- {report['labels_a']:.1%} of the labels are A",
        f"- {twins['films']} films under several spellings {'; '.join(twins['examples'])}".rstrip(),
        f"- {report['comparisons_with_a_film_of_a_later_year']:,} comparisons with a film of a later year than they",
        "- test comparisons with a film that no training comparison shows:"
        f" {report['test_comparisons_preferred_film_cold']:,} as the preferred one,"
        f" {report['test_comparisons_other_film_cold']:,} as the other",
    ]
    return [
        "\n".join([*leaks, *facts]),
        "## What simple rules score",
        "Accuracy and its 95 % interval on the test part, counted on the training part: {test:,} and {train:,}"
        " comparisons.".format(**report["baselines_counted_on"]),
        _rules(report["baselines"]),
    ]


def _controls(controls: Mapping[str, Any]) -> str:
    note = "The set with other users' histories is made at evaluation, of the test users alone."
    rows = [
        (name, found["file"], f"`{found['sha256']}`", *(f"{x['accuracy']:.1%}" for x in found["shortcuts"].values()))
        for name, found in controls.items()
    ]
    if not rows:
        return note
    return "\n\n".join([note, _table(("Set", "File", "SHA-256", "Past popularity", "All-time popularity"), rows)])


def _rules(rules: Mapping[str, Any]) -> str:
    rows = [(name_of(name), f"{row['accuracy']:.1%}", number(row["accuracy_ci95"])) for name, row in rules.items()]
    return _table(("Rule", "Accuracy", "Interval"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
