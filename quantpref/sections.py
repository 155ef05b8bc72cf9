"""The report's content without its form: results.json as sections of notes, tables and films.

A section whose numbers results.json lacks is left out. report.py gives it a form, figures.py draws its figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpref.verdict import p_text

NAMES = {
    "always_a": "Always A",
    "popularity": "Popularity",
    "genre_overlap": "Genre overlap",
    "co_occurrence": "Co-occurrence",
    "past_popularity": "Past popularity",
    "all_time_popularity": "All-time popularity",
    "release_year": "Newer film",
    "logistic_regression": "Log. regression",
    "base": "Base, no adapter",
    "sft": "SFT Baseline",
    "sft-more": "SFT, trained on",
    "dpo": "DPO Optimized",
    "dpo-from-base": "DPO from base",
}
MEANINGS = {
    "accuracy": "share right, margin averaged over both orders; a tie is half right",
    "accuracy_ci95": "95 % Wilson interval",
    "confidence": "mean of 2P − 1, from -1 to 1; P: probability of the preferred film",
    "mean_margin": "nats",
    "accuracy_preferred_first": "share right with the preferred film as option A",
    "accuracy_preferred_second": "share right with the preferred film as option B",
    "accuracy_single_order": "share right, each order judged alone",
    "confidence_single_order": "each order judged alone",
    "brier_single_order": "each order judged alone",
    "flip_rate": "share of comparisons whose two orders disagree",
    "answer_mass": "p(A) + p(B) at the answer slot",
    "ties": "comparisons with a margin of exactly 0",
    "auc": "of log p(A) − log p(B) against 'A is preferred'",
    "brier": "mean of (1 − P)², lower is better",
    "nll": "mean of −log P, nats, lower is better",
    "ece": "expected calibration error, 15 bins, lower is better",
    "temperature": "fitted on the validation users",
    "temperature_at_bound": "whether the fit hit 0.05 or 100",
    "brier_calibrated": "after temperature scaling",
    "nll_calibrated": "nats, after temperature scaling",
    "ece_calibrated": "after temperature scaling",
}
TESTS = {
    "confidence": "Confidence, DPO − SFT",
    "brier_calibrated": "Brier after scaling, DPO − SFT",
    "flip_rate": "Flip rate, DPO − SFT",
    "accuracy_against_sft_more": "Accuracy, DPO − SFT trained on",
    "accuracy_on_popularity-matched": "Accuracy, DPO − SFT, popularity-matched",
    "accuracy_on_swapped-user": "Accuracy, DPO − SFT, another user's history",
}
CONTROLS = {"popularity-matched": "Popularity-matched", "swapped-user": "Another user's history"}
CONTROL_MEANINGS = {
    "popularity-matched": "Popularity-matched: the other film is one that as many people had rated by then.",
    "swapped-user": "Another user's history: options as they were, the history from somebody else, of the same length "
    "and about the same time.",
}
ADAPTER_FACTS = (
    "kind", "adapter_sha256", "lineage.started_from", "lineage.reference", "seed", "steps", "counts.pairs",
    "counts.preferred_first", "counts.shortened", "per_device_train_batch_size", "trainable_weights", "tokens_seen",
    "first_loss", "last_tenth_mean_loss", "wall_seconds", "pairs_per_second", "peak_memory_gib",
    "environment.device", "environment.git_commit",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    notes: Sequence[str] = ()
    figure: str | None = None
    """Name of the figure in figures.draw, which draws it from the same keys of results.json."""
    tables: Sequence[Table] = ()
    films: Sequence[Mapping[str, Any]] = ()


def arm_order(results: Mapping[str, Any]) -> list[str]:
    """Base first, SFT and DPO last, so that the two stand side by side everywhere."""
    arms = results["arms"]
    order = ["base", *(a for a in arms if a not in ("base", "sft", "dpo")), "sft", "dpo"]
    return [arm for arm in order if arm in arms]


def name_of(arm: str) -> str:
    return NAMES.get(arm, arm)


def number(value: Any) -> str:
    """A cell's text: four decimals for a float, "0.1000 to 0.2000" for an interval, "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(number(x) for x in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def sections(results: Mapping[str, Any]) -> list[Section]:
    """What follows the verdict and the table, in the report's order."""
    parts = (
        _accuracies(), _controls(results), _training(results), _confidence(results), _reliability(results),
        _position(results), _slices(results), _disagreements(results), _numbers(results), _secondary(results),
        _reasoning(results), _against_sft(results), _quantisation(results), _runs(results), _provenance(results),
    )  # fmt: skip
    return [part for part in parts if part]


def _accuracies() -> Section:
    note = "Share of the test comparisons that each one gets right, with its 95 % interval. The dotted line is a coin."
    return Section("Accuracy", [note], "accuracy")


def control_rows(results: Mapping[str, Any]) -> list[str]:
    """Who stands in the figure and table of the control sets: the popularity baseline, and every arm."""
    scored = [found["arms"] | found["baselines"] for found in results["controls"].values()]
    return [who for who in ("popularity", *arm_order(results)) if all(who in found for found in scored)]


def control_of(results: Mapping[str, Any], name: str, who: str) -> Mapping[str, Any]:
    """What an arm or a baseline scores on a control set."""
    found = results["controls"][name]
    return found["baselines" if who in found["baselines"] else "arms"][who]


def _controls(results: Mapping[str, Any]) -> Section | None:
    controls = results.get("controls")
    if not controls:
        return None
    notes = [
        "What is left when something is taken away, in percent of the same comparisons. "
        + " ".join(CONTROL_MEANINGS[name] for name in controls)
    ]
    if "swapped-user" in controls:
        notes += [_personalised(results, arm) for arm in ("sft", "dpo") if arm in controls["swapped-user"]["arms"]]
    main = {who: (results["baselines"] | results["arms"])[who]["accuracy"] for who in control_rows(results)}
    head = ["", "Main test"]
    for name in controls:
        head += [f"{CONTROLS[name]} (n = {controls[name]['n']:,})", "Main less that, points (95 %)"]
    rows = []
    for who, accuracy in main.items():
        row = [name_of(who), _percent(accuracy)]
        for name in controls:
            found = control_of(results, name, who)
            row += [_percent(found["accuracy"]), _gain({**found, "difference_pp": found["main_less_control_pp"]})]
        rows.append(row)
    return Section("What the model personalises", notes, "controls", [Table(head, rows)])


def _personalised(results: Mapping[str, Any], arm: str) -> str:
    """In one sentence, what an arm owes to the user's own history."""
    found = control_of(results, "swapped-user", arm)
    low, high = found["ci95_pp"]
    reading = "it reads the history" if low > 0 else "it is not shown to read the history at all"
    return (
        f"{name_of(arm)} is right in {_percent(found['main_accuracy'])} with the user's own history and in "
        f"{_percent(found['accuracy'])} with another's: {found['main_less_control_pp']:+.1f} points (95 % interval "
        f"{low:+.1f} to {high:+.1f}) are what it personalises; {reading}."
    )


def _training(results: Mapping[str, Any]) -> Section | None:
    if not any(results.get("training", {}).values()):
        return None
    notes = [
        "Light: every step. Dark: a moving average. The SFT loss counts the tokens of the right response; the DPO loss "
        "counts pairs, and starts at ln 2 = 0.693, where the policy equals its reference. The reward margin is beta "
        "times how far DPO has moved the right response away from the wrong one, in nats."
    ]
    return Section("Training", notes, "training")


def _with(results: Mapping[str, Any], key: str) -> bool:
    return any(arm.get(key) for arm in results["arms"].values())


def _confidence(results: Mapping[str, Any]) -> Section | None:
    if not _with(results, "confidence_histogram"):
        return None
    notes = [
        "How sure each arm is, from -1 (sure of the wrong film) to 1 (sure of the right one); the line is the mean. "
        "DPO's confidence rises with 1/beta by construction: only the calibrated numbers below say whether it is "
        "deserved. Each histogram has its own vertical scale."
    ]
    return Section("Confidence", notes, "confidence")


def _reliability(results: Mapping[str, Any]) -> Section | None:
    if not _with(results, "reliability"):
        return None
    notes = [
        "An arm that says 80 % should be right in 80 % of such comparisons: on the dashed line. Bins of equal size; "
        "before and after dividing the margins by one temperature T per arm, fitted on the validation users."
    ]
    bound = [name_of(a) for a in arm_order(results) if results["arms"][a].get("temperature_at_bound")]
    if bound:
        notes.append(
            f"T hit its bound, 0.05 or 100, for {', '.join(bound)}: at 100 no confidence at all fits best, at 0.05 "
            "full confidence does."
        )
    head = ["", "ECE", "ECE scaled", "Brier", "Brier scaled", "T"]
    keys = ("ece", "ece_calibrated", "brier", "brier_calibrated", "temperature")
    return Section("Reliability", notes, "reliability", [_arm_table(results, head, keys)])


def _arm_table(results: Mapping[str, Any], head: list[str], keys: Sequence[str]) -> Table:
    arms = results["arms"]
    return Table(head, [[name_of(arm), *(number(arms[arm].get(key)) for key in keys)] for arm in arm_order(results)])


def _position(results: Mapping[str, Any]) -> Section | None:
    if not _with(results, "accuracy_preferred_first"):
        return None
    note = (
        "Every comparison is asked in both orders. Without position bias both accuracies agree, and few answers change "
        "when the options change places (flip rate)."
    )
    head = ["", "Preferred first", "Preferred second", "Flip rate", "Answer mass"]
    keys = ("accuracy_preferred_first", "accuracy_preferred_second", "flip_rate", "answer_mass")
    return Section("Position bias", [note], "position", [_arm_table(results, head, keys)])


def _slices(results: Mapping[str, Any]) -> Section | None:
    tables = []
    for kind, rows in results.get("slices", {}).items():
        cells = [[str(r["slice"]), f"{r['n']:,}", *(_percent(r[a]) for a in ("sft", "dpo")), _gain(r)] for r in rows]
        if cells:
            head = ["Slice", "n", "SFT", "DPO", "DPO − SFT, points (95 %)"]
            tables.append(Table(head, cells, kind[:1].upper() + kind[1:]))
    note = (
        "Where the difference comes from: accuracy by slice, n comparisons each. These are many looks at one test set, "
        "with no correction: expect one interval in twenty to miss 0 by chance."
    )
    return Section("Slices", [note], "slices", tables) if tables else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _gain(row: Mapping[str, Any]) -> str:
    if row["difference_pp"] is None:
        return "-"
    interval = row.get("ci95_pp")
    return f"{row['difference_pp']:+.1f}" + (f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else "")


def _disagreements(results: Mapping[str, Any]) -> Section | None:
    films = results.get("disagreements", [])
    note = (
        f"The {len(films)} comparisons in which the probability given to the preferred film differs most between SFT "
        "and DPO; above 50 % the arm is right. They are picked for being extreme, and stand for nothing but themselves."
    )
    return Section("Where SFT and DPO disagree most", [note], films=films) if films else None


def _numbers(results: Mapping[str, Any]) -> Section:
    arms, order = results["arms"], arm_order(results)
    keys = dict.fromkeys(k for arm in order for k, v in arms[arm].items() if not isinstance(v, dict))  # those are drawn
    rows = [[_with_meaning(key), *(number(arms[arm].get(key)) for arm in order)] for key in keys]
    note = (
        "Accuracies and probabilities are in 0..1, margins and NLL in nats; `_calibrated` is after one temperature per "
        "arm, fitted on the validation users; `_single_order` is the mean over the two orders of the options, each "
        "judged alone."
    )
    decided = {key: found for key, found in results["verdict"].items() if key not in ("outcome", "reasons")}
    tables = [Table(["", *map(name_of, order)], rows), _flat_table("What the verdict rests on", decided)]
    return Section("Every number", [note], tables=tables)


def _with_meaning(key: str) -> str:
    return f"{key}: {MEANINGS[key]}" if key in MEANINGS else key


def _secondary(results: Mapping[str, Any]) -> Section | None:
    tests = results.get("secondary_tests")
    if not tests:
        return None
    note = (
        "None of these decides the verdict. p: user-level sign-flip permutation; Holm: the same p, corrected for "
        f"asking {len(tests)} questions at once."
    )
    rows = [
        [
            TESTS.get(t["test"], str(t["test"]).replace("_", " ")),
            f"{t['difference']:+.4f}",
            *(p_text(t[key]).removeprefix("p ").removeprefix("= ") for key in ("p_value", "p_holm")),
        ]
        for t in tests
    ]
    return Section("Secondary tests", [note], tables=[Table(["", "Difference", "p", "Holm"], rows)])


def _points(difference: float, interval: Sequence[float]) -> list[str]:
    return [f"{difference:+.2f}", f"{interval[0]:+.2f} to {interval[1]:+.2f}"]


def _against_sft(results: Mapping[str, Any]) -> Section | None:
    found = results.get("against_sft")
    if not found:
        return None
    note = "Accuracy on the same comparisons, less SFT's, in percentage points. Only DPO's decides the verdict."
    rows = [
        [name_of(arm), *_points(row["difference_pp"], row["ci95_pp"]), p_text(row["p_value"])]
        for arm, row in found.items()
    ]
    return Section("Every arm against SFT", [note], tables=[Table(["", "Difference", "95 % interval", "p"], rows)])


def _quantisation(results: Mapping[str, Any]) -> Section | None:
    found = results.get("quantisation")
    if not found:
        return None
    note = (
        "The same adapters on the base in 16 bits: accuracy there, and the percentage points lost in 4 bits. DPO "
        "counts as unstable where the lower bound of its loss less SFT's is above 2 points."
    )
    rows = [
        [name_of(arm), _percent(row["accuracy_16bit"]), *_points(row["loss_pp"], row["ci95_pp"])]
        for arm, row in found["arms"].items()
    ]
    if excess := found["dpo_less_sft"]:
        rows.append(["DPO's loss less SFT's", "-", *_points(excess["loss_pp"], excess["ci95_pp"])])
    head = ["", "Accuracy, 16 bits", "Lost in 4 bits", "95 % interval"]
    return Section("What quantisation costs", [note], tables=[Table(head, rows)])


def _runs(results: Mapping[str, Any]) -> Section | None:
    runs = results.get("runs")
    if not runs:
        return None
    note = "Per comparison the mean over seeds was tested; the intervals above resample seeds and users."
    rows = [
        [
            run["folder"], str(run["seed"]), _percent(run["accuracy_sft"]), _percent(run["accuracy_dpo"]),
            f"{run['difference_pp']:+.2f}", run["outcome"],
        ]
        for run in runs
    ]  # fmt: skip
    head = ["Run", "Seed", "SFT", "DPO", "Difference", "Outcome alone"]
    return Section("The seeds", [note], tables=[Table(head, rows)])


def _reasoning(results: Mapping[str, Any]) -> Section | None:
    checks = results.get("reasoning_check")
    if not checks:
        return None
    note = (
        "Answers generated greedily: the share that follow the form, that recommend the film with the higher score, "
        "and that name exactly the genres of the film they recommend."
    )
    rows = [
        [name_of(arm), str(c["n"]), *(_percent(c[key]) for key in ("form", "agrees", "exact_genres"))]
        for arm, c in checks.items()
    ]
    head = ["", "Answers", "Form", "Agrees with the score", "Exact genres"]
    return Section("Reasoning check", [note], tables=[Table(head, rows)])


def _provenance(results: Mapping[str, Any]) -> Section:
    data, base = results["data"], results["base"]
    notes = [
        f"{data['n_test']:,} test comparisons of {data['users_test']:,} users from `{data['test_file']}` (SHA-256 "
        f"`{data['sha256']}`), base `{base['model']}` (fingerprint `{base['fingerprint'][:16]}`), seed "
        f"{results['config']['seed']}, device {results['environment']['device']}. Every number can be recomputed from "
        "`predictions.parquet`."
    ]
    tables = [_flat_table("Data", data), _flat_table("Base model", base)]
    adapters = results.get("adapters", {})
    if adapters:
        facts = [dict(_flat(adapter)) for adapter in adapters.values()]
        rows = [[fact, *(_short(found.get(fact)) for found in facts)] for fact in ADAPTER_FACTS]
        tables.append(Table(["", *map(name_of, adapters)], rows, "Adapters, from their manifests"))
    tables += [_flat_table("Environment", results["environment"]), _flat_table("Configuration", results["config"])]
    return Section("What was run", notes, tables=tables)


def _flat_table(title: str, value: Mapping[str, Any]) -> Table:
    rows = [[key, _plain(found)] for key, found in _flat(value)]
    return Table(["", "Value"], rows, title)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, found in value.items():
        if isinstance(found, Mapping):
            yield from _flat(found, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", found


def _plain(value: Any) -> str:
    """As results.json has it, unlike number(): a learning rate needs its digits."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    text = number(value)
    return text[:12] if len(text) >= 40 else text  # a hash: its first 12 digits tell it apart
