"""figures.py: files that open, the same bytes twice, one colour an arm, and no figure without its numbers."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
from example_results import example_results, failed_results
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from quantpref import figures
from quantpref.sections import sections

ALL = ["accuracy", "controls", "training", "confidence", "reliability", "position", "slices"]
EVERY_RUN = ["accuracy", "controls", "confidence", "reliability", "position"]
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


@pytest.fixture(scope="module")
def results():
    return example_results()


@pytest.fixture(scope="module")
def drawn(results):
    return figures.draw(results)


@pytest.fixture(scope="module")
def saved(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "figures"
    figures.save(drawn, folder)
    return folder


def colours_of(figure):
    """Every line's and patch's colour in the axes."""
    lines = [line.get_color() for ax in figure.axes for line in ax.get_lines()]
    patches = [patch.get_facecolor() for ax in figure.axes for patch in ax.patches]
    return {to_hex(colour).upper() for colour in [*lines, *patches]}


def test_draws_every_figure_in_the_reports_order(results, drawn):
    assert list(drawn) == ALL == [s.figure for s in sections(results) if s.figure]


def test_a_figure_without_numbers_is_left_out_like_its_section(results):
    empty = {**results, "training": {"sft": [], "dpo": []}, "slices": {"main genre": []}}
    assert list(figures.draw(empty)) == EVERY_RUN
    assert [s.figure for s in sections(empty) if s.figure] == EVERY_RUN
    less = copy.deepcopy(results)
    del less["controls"], less["training"], less["slices"]
    for arm in less["arms"].values():
        del arm["confidence_histogram"], arm["reliability"], arm["accuracy_preferred_first"]
    assert list(figures.draw(less)) == ["accuracy"] == [s.figure for s in sections(less) if s.figure]


@pytest.mark.parametrize(("run", "panels"), [("sft", 1), ("dpo", 3)])
def test_training_curves_of_one_run_alone(results, run, panels):
    alone = {**results, "training": {run: results["training"][run]}}
    figure = figures.draw(alone)["training"]
    assert len(figure.axes) == panels
    assert all(ax.get_lines() for ax in figure.axes)


def test_failed_training_still_draws_what_there_is():
    assert list(figures.draw(failed_results())) == ALL[:-1]


def test_png_is_200_dpi_and_pdf_embeds_its_fonts_without_a_date(saved: Path):
    assert sorted(p.name for p in saved.iterdir()) == sorted(f"{name}.{ext}" for name in ALL for ext in ("pdf", "png"))
    for name in ALL:
        with Image.open(saved / f"{name}.png") as image:
            image.load()
            assert image.width == round(200 * figures.WIDTH_INCHES)
            assert image.convert("L").getextrema()[0] < 100  # something is drawn
        pdf = (saved / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-")
        assert b"%%EOF" in pdf[-10:]
        assert b"/FontFile2" in pdf
        assert b"/CreationDate" not in pdf
        assert b"/Subtype /Image" not in pdf  # all vector


def test_same_results_give_the_same_bytes(results, drawn, tmp_path: Path):
    again = figures.draw(copy.deepcopy(results))
    for name in ALL:
        assert figures.svg(drawn[name]) == figures.svg(again[name])
    figures.save({"accuracy": drawn["accuracy"]}, tmp_path / "one")
    figures.save({"accuracy": again["accuracy"]}, tmp_path / "two")
    for file in ("accuracy.png", "accuracy.pdf"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_nothing_is_cut_off_at_the_edge(saved: Path):
    for name in ALL:
        with Image.open(saved / f"{name}.png") as image:
            pixels = np.array(image.convert("L"))
        assert pixels[6:-6, 6:-6].min() < 100
        pixels[6:-6, 6:-6] = 255
        assert pixels.min() > 250, name


def test_svg_brings_its_own_ids_and_takes_the_pages_ink(drawn):
    svg = figures.svg(drawn["slices"])
    assert svg.startswith("<svg")
    assert "viewBox" in svg.split(">")[0]
    assert not re.search(r'\s(width|height)="', svg.split(">")[0])
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(i.startswith("slices-") for i in ids)
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {p for i in ids for p in ((i, ""), ("", i))}
    assert "currentColor" in svg
    assert figures.INK.lower() not in svg.lower()
    assert "<metadata" not in svg


def test_sft_and_dpo_have_one_colour_everywhere(results, drawn):
    assert figures.COLOURS["sft"] in OKABE_ITO and figures.COLOURS["dpo"] in OKABE_ITO
    for name in ("accuracy", "training", "confidence", "reliability", "position"):
        assert {figures.COLOURS["sft"], figures.COLOURS["dpo"]} <= colours_of(drawn[name]), name
    without = copy.deepcopy(results)
    del without["arms"]["base"], without["arms"]["sft-more"]
    found = colours_of(figures.draw(without)["accuracy"])
    assert {figures.COLOURS["sft"], figures.COLOURS["dpo"]} <= found
    assert not {figures.COLOURS["base"], figures.COLOURS["sft-more"]} & found


def test_arms_differ_for_colour_blind_readers():
    # Viénot, Brettel & Mollon 1999: linear RGB seen by a protanope and a deuteranope.
    matrices = [
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    ]
    for matrix in [np.eye(3), *matrices]:
        seen = {arm: np.clip(matrix @ np.array(to_rgb(c)) ** 2.2, 0, 1) ** (1 / 2.2) for arm, c in
                figures.COLOURS.items()}  # fmt: skip
        assert np.linalg.norm(seen["sft"] - seen["dpo"]) > 0.5
        for one, other in (("sft", "sft-more"), ("dpo", "sft-more"), ("sft", "base"), ("dpo", "base")):
            assert np.linalg.norm(seen[one] - seen[other]) > 0.2, (one, other)


def test_further_adapters_get_colours_and_a_dollar_stays_a_dollar(results):
    more = copy.deepcopy(results)
    more["arms"]["$beta_0.3$ <b>"] = copy.deepcopy(more["arms"]["dpo"])
    more["training"]["$beta_0.3$ <b>"] = more["training"]["dpo"]
    drawn = figures.draw(more)
    assert figures.SPARE_COLOURS[0] in colours_of(drawn["accuracy"])
    assert "$beta_0.3$ <b>" in [t.get_text() for t in drawn["accuracy"].axes[0].get_yticklabels()]
    assert "<b>" not in figures.svg(drawn["accuracy"])


def test_axes_are_labelled_with_units(drawn):
    for name in ALL:
        labels = " ".join(
            [t for ax in drawn[name].axes for t in (ax.get_xlabel(), ax.get_ylabel())]
            + [drawn[name].get_supxlabel(), drawn[name].get_supylabel()]
        )
        assert "%" in labels or "nats" in labels, name


def test_smoothing_is_an_average_that_leaves_out_gaps():
    assert figures.smoothed(np.ones(3)).tolist() == [1, 1, 1]
    assert figures.smoothed(np.array([0.0, 1, 2, 3, 4]))[2] == pytest.approx(2)
    assert figures.smoothed(np.array([1.0, np.nan, 3])).tolist() == pytest.approx([1, 2, 3])
    assert np.isnan(figures.smoothed(np.array([np.nan, np.nan]))).all()
