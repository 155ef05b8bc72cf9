"""The notebook as a user runs it, and the functions behind its pages."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from config import PRESETS, ROOT, Config
from quantpref import browse, explore
from quantpref.comparisons import Movie, flip, load, save
from quantpref.runs import write_manifest
from quantpref.scoring import Scores
from quantpref.simulate import simulate

NOTEBOOK = ROOT / "dpo_comparison.ipynb"
# One thread: on a busy machine, threads that wait for each other make so small a model ten times slower.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run of the tiny preset on 150 simulated people."""
    folder = tmp_path_factory.mktemp("notebook")
    save(folder / "people.jsonl", simulate(150, seed=5).comparisons)
    for script in ("train_dpo.py", "evaluate_dpo.py"):
        flags = ["--preset", "tiny", "--data", str(folder / "people.jsonl"), "--output-dir", str(folder / "run")]
        command = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | QUIET)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="session")
def run(finished):
    return browse.open_run(finished)


@pytest.fixture(scope="session")
def arms(run):
    return browse.load_arms(run)


def execute(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook, executed where it stands; raises CellExecutionError."""
    for name, value in {**QUIET, "QUANTPREF_RUN": str(run_folder)}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(ROOT)}},
        store_widget_state=False,
    )  # fmt: skip
    client.execute()
    return notebook


def text(page: str) -> str:
    """What a reader sees of some HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_the_committed_notebook_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-z-]+", i) for i in ids)
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


def test_it_runs_from_top_to_bottom(finished, run, monkeypatch):
    notebook = execute(finished, monkeypatch)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    everything = [output for found in outputs.values() for output in found]
    assert not [o for o in everything if o.output_type in ("error", "stream")]  # nor any library's chatter
    assert sum("image/png" in o.data for o in everything) >= 8
    verdict = text(outputs["verdict"][0].data["text/html"])
    assert f"VERDICT: {run.results['verdict']['outcome']}" in verdict
    assert all(reason in verdict for reason in run.results["verdict"]["reasons"])
    assert "DPO Optimized" in outputs["comparison-table"][0].data["text/plain"]
    # The slider, and for pages where none runs, the comparison that it starts with.
    bundle = outputs["browser"][0].data
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "Watched, oldest first" in bundle["text/html"]
    own = text(outputs["own"][0].data["text/html"])
    assert "Terminator 2: Judgment Day (1991)" in own and "DPO Optimized" in own


def test_without_a_run_it_ends_with_one_line(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path / "nothing", monkeypatch)
    message = stopped.value.traceback.rsplit("------------------\n", 1)[1].strip()  # the cell stands above
    assert message.startswith(f"No finished run in {tmp_path / 'nothing'}: run `python train_dpo.py --preset tiny")
    assert "QUANTPREF_RUN" in message and "\n" not in message and "Traceback" not in message


def test_results_alone_are_enough(finished, tmp_path):
    shutil.copytree(finished / "evaluation", tmp_path / "evaluation")
    alone = browse.open_run(tmp_path)
    assert browse.load_arms(alone) is None
    own = browse.own_comparison("Alien (1979)", "Heat (1995) (Crime)", "Babe (1995) (Comedy)")
    assert "needs no model" in browse.own_answer(alone, None, own).data
    assert explore.tokenizer(alone) is not None  # the embedded base's
    assert explore.tokenizer(replace(alone, config=replace(alone.config, base_model="some/hub-id"))) is None
    assert "Comparison" in browse.show_comparison(alone, 0)


def test_another_data_file_is_refused(finished, tmp_path):
    shutil.copytree(finished / "evaluation", tmp_path / "evaluation")
    data = tmp_path / "people.jsonl"
    save(data, [flip(c) for c in load(finished.parent / "people.jsonl")])
    results = tmp_path / "evaluation" / "results.json"
    results.write_text(results.read_text().replace(str(finished.parent / "people.jsonl"), str(data)))
    with pytest.raises(browse.Stop, match=r"results\.json: is not the file that its manifest records"):
        browse.open_run(tmp_path)
    write_manifest(results.parent, {})
    with pytest.raises(browse.Stop, match=r"people\.jsonl: is not the file that .* was made with"):
        browse.open_run(tmp_path)
    results.write_text("{}")
    write_manifest(results.parent, {})
    with pytest.raises(browse.Stop, match="lacks verdict"):
        browse.open_run(tmp_path)


def test_the_config_is_rebuilt(tmp_path):
    tiny = PRESETS["tiny"]
    tiny = replace(tiny, runs=(Path("a"), Path("b")), adapter=("mine=there",), sft_adapter=Path("sft"))
    assert browse.rebuilt_config(json.loads(json.dumps(tiny.as_json())), tiny.output_dir) == tiny
    default = browse.rebuilt_config(Config().as_json(), tmp_path)
    assert default == replace(Config(), output_dir=tmp_path)
    # Trained in another checkout: its data and base are looked for in this one.
    elsewhere = {
        k: str(v).replace(str(ROOT), "/gpu/box") for k, v in tiny.as_json().items() if k in ("data", "base_model")
    }
    assert browse.rebuilt_config({**tiny.as_json(), **elsewhere}, tiny.output_dir) == tiny
    with pytest.raises(Exception, match="settings unknown here: warp_factor"):
        browse.rebuilt_config({"warp_factor": 9}, tmp_path)


def test_your_own_history_scores_as_the_evaluation_did(run, arms):
    for row in (0, 7):
        page = browse.own_answer(run, arms, run.test[row]).data
        shown = [float(x) for x in re.findall(r"([\d.]+)%<div", page)]
        expected = [
            100 / (1 + np.exp(-m))
            for arm in ("base", "sft", "dpo")
            for m in (*run.scores[arm].order_margins[row], run.scores[arm].margins[row])
        ]
        np.testing.assert_allclose(shown, expected, atol=0.06)


def test_an_adapter_that_was_not_evaluated_is_refused(run):
    identity = {"adapters": {"sft": "0" * 64, "dpo": "0" * 64}}
    with pytest.raises(browse.Stop, match="is not the adapter that was evaluated"):
        browse.load_arms(replace(run, results=run.results | {"identity": identity}))


def test_own_films_are_read_by_the_data_parser(run):
    a, b = "Hot: One (1995) (Action|Crime)", "I, Robot: Part 2. (2004) (no genres listed)"
    own = browse.own_comparison("\n Alien (1979)\nGood, the Bad and the Ugly, The (1966) \n", a, b)
    assert list(map(str, own.history)) == ["Alien (1979)", "Good, the Bad and the Ugly, The (1966)"]
    assert own.option_a == Movie("Hot: One", 1995, ("Action", "Crime")) and own.option_b.genres == ()
    seen = run.data.split.train[0]
    assert browse.unknown_films(run, replace(own, history=(*seen.history, *own.history[1:]))) == [
        "Good, the Bad and the Ugly, The (1966)", str(own.option_a), str(own.option_b),
    ]  # fmt: skip
    for history, first, second, why in (
        ("Alien", a, b, "cannot be read"),
        ("Alien (1979)", "Hot: One (1995)", b, "cannot be read"),
        ("Alien (1979)", a, a, "both options are"),
        ("Hot: One (1995)", a, b, "in the history"),
    ):
        with pytest.raises(browse.Stop, match=f"Your films: .*{why}"):
            browse.own_comparison(history, first, second)


def test_a_card_escapes_what_others_wrote(comparisons):
    evil = "<script>alert(1)</script>"
    comparison = replace(
        comparisons(1)[0],
        history=(Movie(evil, 1999),),
        option_a=Movie(evil + "a", 1999, (evil,)),
        option_b=Movie(evil + "b", 1999, (evil,)),
    )
    page = browse.card(comparison, {evil: np.array([1.0, 2.0])}, {evil: "#000"})
    page += explore.verdict_box({"verdict": {"outcome": evil, "reasons": [evil], "p_value": 0.5}}).data
    page += explore.example(comparison, None, Config()).data
    assert "<script" not in page and html.escape(evil) in page


def test_a_card_shows_both_orders(comparisons):
    comparison = comparisons(4)[3]  # the preferred film is option B
    page = browse.card(comparison, {"sft": np.array([np.log(3), -np.log(9)])}, {"sft": "#000"})
    assert re.findall(r"([\d.]+%)<div", page) == ["75.0%", "10.0%", "36.6%"]
    assert f"{comparison.other} ✗" in text(page)
    assert f"preferred: {comparison.preferred}" in text(page)
    unknown = text(browse.card(comparison, {"sft": np.array([1.0, 1.0])}, {"sft": "#000"}, known=False))
    assert "P(first film)" in unknown and "✓" not in unknown and "preferred" not in unknown
    assert "tie" in text(browse.card(comparison, {"sft": np.zeros(2)}, {"sft": "#000"}))


def scores(order_margins: list[tuple[float, float]]) -> Scores:
    margins = np.array(order_margins) * [1, -1]
    return Scores(margins - 5, np.full_like(margins, -5.0))


def test_selections_and_their_order():
    sft = scores([(1, 1), (-1, -1), (1, 1), (-2, -2), (3, -1)])
    dpo = scores([(1, 1), (2, 2), (-4, -4), (-2, -2), (3, 3)])
    found = browse.selections({"sft": sft, "dpo": dpo})
    assert found["all"][:2] == [2, 1] and sorted(found["all"]) == [0, 1, 2, 3, 4]
    assert found["SFT wrong, DPO right"] == [1] and found["SFT right, DPO wrong"] == [2]
    assert found["both wrong"] == [3] and found["both right"] == [4, 0]
    assert found["SFT changes its mind with the order"] == [4] and not found["DPO changes its mind with the order"]


def test_the_browser_turns_pages(run):
    browser = browse.browser(run)
    which, place, page = browser.children
    rows = browse.selections(run.scores)
    assert page.value == browse.show_comparison(run, rows["all"][0]) and place.max == len(run.test)
    place.value = len(run.test)
    assert page.value == browse.show_comparison(run, rows["all"][-1])
    for name, found in reversed(rows.items()):
        which.value = name
        assert place.value == 1 and place.max == max(1, len(found))
        assert page.value == (browse.show_comparison(run, found[0]) if found else "<p>There is none.</p>")


def test_pieces_are_the_text_and_the_slot_is_marked(tokenizer, comparisons):
    accented = replace(comparisons(1)[0], option_b=Movie("Amélie 東京", 2001, ("Comedy",)))
    for found in (tokenizer, None):
        assert "".join(explore._pieces(found, "before ", "Amélie 東京: B|C.\n")) == "Amélie 東京: B|C.\n"
        page = explore.example(accented, found, Config()).data
        assert [answer.strip() for answer in re.findall(r"font-weight:bold[^>]*>([^<]+)</span>", page)] == ["A", "B"]


def test_popularity_ratios(comparisons):
    train = comparisons(200)
    test = comparisons(30, seed=1)
    seen = [{m: sum(m in map(str, (*c.history, c.preferred)) for c in train) for m in map(str, (t.preferred, t.other))}
            for t in test]  # fmt: skip
    expected = [np.log2((s[str(t.preferred)] + 1) / (s[str(t.other)] + 1)) for s, t in zip(seen, test, strict=True)]
    np.testing.assert_allclose(explore.popularity_ratios(train, test), expected, atol=1e-12)
