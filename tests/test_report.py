"""report.py: what a reader must find, nothing from elsewhere, everything escaped, another version refused."""

import copy
from html.parser import HTMLParser

import pytest
from example_results import example_results, failed_results

from quantpref import figures, report
from quantpref.runs import UserError
from quantpref.sections import sections
from quantpref.verdict import NULL_WARNING

HEADINGS = [
    "Accuracy", "What the model personalises", "Training", "Confidence", "Reliability", "Position bias", "Slices",
    "Where SFT and DPO disagree most", "Every number", "Secondary tests", "Reasoning check", "What was run",
]  # fmt: skip
VOID = {"meta", "img", "br", "hr", "link", "input", "wbr", "path", "use", "rect"}


class Page(HTMLParser):
    """Text, tags and headings of a page; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def results():
    return example_results()


@pytest.fixture(scope="module")
def images(results):
    return {name: figures.svg(figure) for name, figure in figures.draw(results).items()}


@pytest.fixture(scope="module")
def page(results, images):
    return Page(report.html(results, images))


def test_the_printed_table_keeps_its_form():
    row = {"accuracy": 0.785, "accuracy_ci95": [0.761, 0.807], "confidence": 0.2341}
    better = {"accuracy": 0.842, "accuracy_ci95": [0.820, 0.862], "confidence": 0.5821}
    results = {
        "verdict": {"difference_pp": 5.7, "p_value": 0.0003},
        "arms": {"dpo": better, "sft": row},
        "baselines": {"always_a": {"accuracy": 0.5, "accuracy_ci95": [0.472, 0.528]}},
    }
    assert report.table(results).splitlines() == [
        "Model              Accuracy (95% CI)       Confidence  Improvement",
        "Always A           50.00% (47.2-52.8)      -           -",
        "SFT Baseline       78.50% (76.1-80.7)      0.2341      -",
        "DPO Optimized      84.20% (82.0-86.2)      0.5821      +5.70 pp (p = 0.0003)",
    ]


def test_html_has_every_section_in_order_and_every_figure(page, images):
    assert page.headings == HEADINGS
    assert sum(tag == "svg" for tag, _ in page.tags) == len(images) == 7
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_html_says_the_verdict_first_and_every_accuracy(page, results):
    verdict = results["verdict"]
    assert page.text.index(verdict["outcome"]) < page.text.index("Accuracy (95% CI)")
    for reason in verdict["reasons"]:
        assert reason in page.text
    assert f"{verdict['difference_pp']:+.2f} percentage points" in page.text
    for row in [*results["arms"].values(), *results["baselines"].values()]:
        assert f"{row['accuracy']:.2%}" in page.text
    for arm in results["arms"].values():
        for value in arm.values():
            if isinstance(value, float):
                assert f"{value:.4f}" in page.text


def test_html_brings_everything_with_it(results, images, page):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/")), attrs
        assert not any(name.startswith("on") for name in attrs)
    text = report.html(results, images)
    assert "@import" not in text
    assert text.replace("url(#", "").count("url(") == 0
    addresses = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of formats: nothing is fetched
    for part in text.split("http")[1:]:
        assert part.startswith("-equiv") or f"http{part.split(chr(34))[0]}" in addresses


def test_a_hostile_title_is_text(results):
    hostile = copy.deepcopy(results)
    title = "</li><script>alert(1)</script><img src=x onerror=alert(2)> (1999)"
    hostile["disagreements"][0].update(history=[title], option_a=title, option_b=title)
    hostile["slices"]["main genre of the preferred film"][0]["slice"] = title
    hostile["arms"][title] = hostile["arms"]["sft-more"]
    hostile["verdict"]["reasons"].append(title)
    drawn = {name: figures.svg(figure) for name, figure in figures.draw(hostile).items()}
    page = Page(report.html(hostile, drawn))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(title) >= 6
    below_the_fence = report.markdown(hostile).split("```")[-1]
    assert "<script" not in below_the_fence
    assert "<img" not in below_the_fence
    assert "&lt;script&gt;alert(1)" in below_the_fence


def test_a_figure_that_is_no_svg_and_no_png_is_text(results):
    page = Page(report.html(results, {"accuracy": "data:image/png;base64,AAAA", "training": "<b>no figure"}))
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources[0] == "data:image/png;base64,AAAA"
    assert "<b>no figure" not in report.html(results, {"training": "<b>no figure"})


def test_same_input_same_bytes(results, images):
    again = copy.deepcopy(results)
    assert report.html(again, images) == report.html(results, images)
    assert report.markdown(again) == report.markdown(results)


def test_partially_supported_by_chance_is_said_in_the_band():
    results = example_results(gain=False)
    assert results["verdict"]["outcome"] == "PARTIALLY SUPPORTED"
    assert results["verdict"]["p_value"] >= 0.05
    warned = NULL_WARNING[0].upper() + NULL_WARNING[1:] + "."
    page = Page(report.html(results, {}))
    assert page.text.index(warned) < page.text.index("DPO prefers the right film")
    assert report.markdown(results).split("\n")[2] == f"**{warned}**"
    results["verdict"]["p_value"] = 0.04
    assert report.warning(results) is None
    assert report.warning(example_results()) is None


def test_a_temperature_at_its_bound_is_said(results):
    assert "hit its bound" not in report.markdown(results)
    bound = copy.deepcopy(results)
    bound["arms"]["base"].update(temperature=100.0, temperature_at_bound=True)
    assert "T hit its bound, 0.05 or 100, for Base, no adapter:" in report.markdown(bound)


def test_failed_training_still_makes_a_report():
    results = failed_results()
    drawn = {name: figures.svg(figure) for name, figure in figures.draw(results).items()}
    page = Page(report.html(results, drawn))
    assert "NOT SUPPORTED" in page.text
    assert "No difference could be measured" in page.text
    assert "None" not in page.text
    assert "DPO Optimized" not in report.table(results)
    assert report.markdown(results).startswith("# DPO against SFT in 4-bit recommendation: NOT SUPPORTED")


def test_without_the_optional_keys_the_sections_go(results):
    less = copy.deepcopy(results)
    for key in ("controls", "training", "slices", "disagreements", "reasoning_check", "secondary_tests", "adapters"):
        del less[key]
    for arm in less["arms"].values():
        del arm["reliability"], arm["confidence_histogram"]
    expected = ["Accuracy", "Position bias", "Every number", "What was run"]
    assert [s.title for s in sections(less)] == expected
    drawn = {name: figures.svg(figure) for name, figure in figures.draw(less).items()}
    assert Page(report.html(less, drawn)).headings == expected


def test_what_the_model_personalises_is_said_with_its_interval(results):
    [section] = [s for s in sections(results) if s.title == "What the model personalises"]
    found = results["controls"]["swapped-user"]["arms"]["dpo"]
    low, high = found["ci95_pp"]
    assert (
        f"DPO Optimized is right in {found['main_accuracy']:.1%} with the user's own history and in"
        f" {found['accuracy']:.1%} with another's: {found['main_less_control_pp']:+.1f} points (95 % interval"
        f" {low:+.1f} to {high:+.1f}) are what it personalises; it reads the history." in section.notes
    )
    [table] = section.tables
    assert [row[0] for row in table.rows][0] == "Popularity" and len(table.rows[0]) == len(table.head) == 6
    blind = copy.deepcopy(results)
    blind["controls"]["swapped-user"]["arms"]["dpo"]["ci95_pp"] = [-1.0, 2.0]
    assert any("not shown to read the history" in note for s in sections(blind) for note in s.notes)
    del blind["controls"]["swapped-user"]
    assert any(s.figure == "controls" and len(s.notes) == 1 for s in sections(blind))


def test_markdown_has_the_table_the_sections_and_the_figures(results, images):
    text = report.markdown(results)
    assert report.table(results) in text
    assert report.verdict_text(results) in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    for name in images:
        assert f"(figures/{name}.png)" in text
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| ---"):  # a table: as many cells in each row as in its head
            cells = lines[i - 1].count(" | ")
            for row in lines[i + 1 :]:
                if not row.startswith("|"):
                    break
                assert row.count(" | ") == cells, row


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("verdict", "verdict"),
        ("verdict.p_value", "verdict.p_value"),
        ("arms.sft", "arms.sft"),
        ("arms.dpo.confidence", "arms.dpo.confidence"),
        ("baselines.popularity.accuracy_ci95", "baselines.popularity.accuracy_ci95"),
        ("data.n_test", "data.n_test"),
        ("base.fingerprint", "base.fingerprint"),
        ("environment", "environment"),
        ("config.seed", "config.seed"),
        ("training.dpo.3.loss", "training.dpo.3.loss"),
        ("arms.sft.reliability.calibrated", "arms.sft.reliability.calibrated"),
        ("arms.sft.confidence_histogram.edges", "arms.sft.confidence_histogram.edges"),
        (
            "slices.main genre of the preferred film.0.difference_pp",
            "slices.main genre of the preferred film.0.difference_pp",
        ),
        ("disagreements.4.p_dpo", "disagreements.4.p_dpo"),
        ("secondary_tests.0.p_holm", "secondary_tests.0.p_holm"),
        ("reasoning_check.dpo.form", "reasoning_check.dpo.form"),
    ],
)
def test_a_results_json_of_another_version_is_refused_by_name(results, path, said):
    broken = copy.deepcopy(results)
    *parents, last = path.split(".")
    place = broken
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    del place[last]
    for make in (report.check, report.markdown, lambda r: report.html(r, {})):
        with pytest.raises(UserError, match=f"results.json: lacks {said},"):
            make(broken)


@pytest.mark.parametrize("value", [None, [], "text", 3, {"verdict": None}, {"verdict": "SUPPORTED"}])
def test_what_is_no_results_json_is_refused(value):
    with pytest.raises(UserError, match="results.json: lacks verdict"):
        report.check(value)


def test_entries_of_the_wrong_kind_are_refused(results):
    with pytest.raises(UserError, match="entries in slices.main genre"):
        report.check({**results, "slices": {"main genre": "many"}})


def test_check_takes_what_is_whole(results):
    report.check(results)
    report.check(failed_results())
