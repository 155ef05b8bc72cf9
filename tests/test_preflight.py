"""verify_dpo_setup.py: what each check finds, and what it says to do."""

import json
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tiny_runs import tiny

import verify_dpo_setup
from config import PRESETS
from quantpref import preflight
from quantpref.comparisons import load, save
from quantpref.preflight import Check
from quantpref.prompts import tokenise
from quantpref.runs import RunError, UserError

NAME = "somebody/some-base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = {
    "open": (200, "", {"id": NAME, "sha": COMMIT, "gated": False}),
    "gated": (200, "", {"id": NAME, "sha": COMMIT, "gated": "manual"}),
    "no access": (403, "GatedRepo", {"error": "gated"}),
    "unknown": (404, "RepoNotFound", {"error": "not found"}),
    "no revision": (404, "RevisionNotFound", {"error": "not found"}),
    "broken": (500, "", {"error": "no"}),
}


@pytest.fixture
def a_hub(monkeypatch, tmp_path):
    """A hub on this machine that answers as it is told, in place of the real one."""
    answer = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code, body = ANSWERS[answer["kind"]]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    yield answer
    server.shutdown()


def checks(check, config, found=None) -> list[Check]:
    return list(check(config, {} if found is None else found))


@pytest.mark.parametrize(
    ("kind", "said", "todo"),
    [
        ("gated", "gated, and nobody is logged in", "accept its licence on https://huggingface.co/somebody/some-base"),
        ("no access", "gated, and this login has no access", "`hf auth login`"),
        ("unknown", "no such model", "correct --base-model"),
        ("no revision", "has no revision v2", "correct --base-revision"),
        ("broken", "cannot be reached (HfHubHTTPError)", f"hf download {NAME}"),
    ],
)
def test_a_base_that_cannot_be_fetched_is_said_before_it_is_tried(a_hub, kind, said, todo):
    a_hub["kind"] = kind
    found = {"backend": "transformers"}
    [check] = checks(preflight.hub, replace(PRESETS["tiny"], base_model=NAME, base_revision="v2"), found)
    assert (check.status, check.name) == ("fail", "hub")
    assert said in check.found and todo in check.todo
    [base] = checks(preflight.base, replace(PRESETS["tiny"], base_model=NAME), found)
    assert base.status == "fail" and "not tried" in base.found


def test_a_base_that_is_not_pinned_is_named_with_its_commit(a_hub):
    a_hub["kind"] = "open"
    config = replace(PRESETS["tiny"], base_model=NAME)
    reachable, pinned = checks(preflight.hub, config)
    assert reachable.status == "ok" and pinned.status == "warn"
    assert pinned.todo == f"give --base-revision {COMMIT}"
    _, pinned = checks(preflight.hub, replace(config, base_revision=COMMIT))
    assert pinned.status == "ok"


def test_offline_without_the_files(a_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    [check] = checks(preflight.hub, replace(PRESETS["tiny"], base_model=NAME))
    assert check.status == "fail" and "HF_HUB_OFFLINE forbids" in check.found and "hf download" in check.todo


def test_no_hub_at_all(a_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    [check] = checks(preflight.hub, replace(PRESETS["tiny"], base_model=NAME))
    assert check.status == "fail" and "127.0.0.1:9 cannot be reached" in check.found


def test_a_base_in_the_cache_needs_no_hub(a_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    reachable, pinned = checks(preflight.hub, replace(PRESETS["tiny"], base_model=NAME))
    assert "in the cache" in reachable.found and pinned.status == "warn"


def test_a_folder_needs_no_hub(tmp_path):
    found = {}
    assert checks(preflight.hub, PRESETS["tiny"], found) == [] and found["reachable"]
    assert checks(preflight.hub, replace(PRESETS["tiny"], base_model=str(tmp_path / "nowhere")), found := {}) == []
    assert found["reachable"]  # loading it says that it is not there


def test_packages_missing_and_other(monkeypatch):
    real = preflight.metadata.version

    def version(name):
        if name == "peft":
            raise preflight.metadata.PackageNotFoundError
        return "0.0" if name == "trl" else real(name)

    monkeypatch.setattr(preflight.metadata, "version", version)
    missing, other = checks(preflight.packages, PRESETS["tiny"])
    assert (missing.status, missing.found) == ("fail", "missing: peft")
    assert other.status == "warn" and "trl 0.0 (pinned" in other.found


def test_a_driver_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(preflight, "driver_version", lambda: "580.1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check, _ = checks(preflight.device, PRESETS["tiny"])
    assert check.status == "fail" and "driver 580.1, which torch (built with" in check.found


def test_the_driver_is_asked_for_by_a_fixed_command(monkeypatch):
    def answer(command, **options):
        assert command[0] == "nvidia-smi" and "shell" not in options
        return subprocess.CompletedProcess(command, 0, "580.65\n580.65\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    assert preflight.driver_version() == "580.65"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert preflight.driver_version() is None


def test_duplicates_are_counted_and_named(tmp_path):
    config = tiny(tmp_path)
    rows = load(config.data)
    twice = config.data.with_name("twice.jsonl")
    save(twice, [*rows, replace(rows[4], line=81), replace(rows[4], line=82)])
    *_, check = checks(verify_dpo_setup.data, replace(config, data=twice))
    assert (check.status, check.name) == ("warn", "duplicates")
    assert check.found == "1 comparisons stand more than once (lines 5 and 81)" and "remove" in check.todo


def test_json_holds_every_finding(tmp_path, capsys, tokenizer):
    config = tiny(tmp_path)
    pairs, _ = tokenise(tokenizer, load(config.data))
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    config = replace(config, max_length=longest - 1)
    verify_dpo_setup.main(config, as_json=True)
    out, _ = capsys.readouterr()
    found = json.loads(out)
    by_name = {check["name"]: check for check in found["checks"]}
    assert found["failed"] == 0
    assert {"python", "packages", "device", "data", "labels", "duplicates", "power", "base", "length", "disk", "4-bit",
            "4-bit kernel", "DPO step", "reload", "time"} <= by_name.keys()  # fmt: skip
    assert (
        by_name["length"]["status"] == "warn"
        and f"rows are longer than {longest - 1} tokens" in by_name["length"]["found"]
    )
    assert "loss 0.6931" in by_name["DPO step"]["found"] and "56 of 56 adapter" in by_name["DPO step"]["found"]
    assert "within 0.0e+00 nats" in by_name["reload"]["found"]


def test_a_check_that_breaks_is_one_that_failed(tmp_path, capsys, monkeypatch):
    config = tiny(tmp_path)
    config.data.write_text("{\n")
    monkeypatch.setattr("quantpref.four_bit.four_bit_error", lambda: 1 / 0)
    with pytest.raises(RunError, match=r"^3 check\(s\) failed"):
        verify_dpo_setup.main(config, as_json=False)
    out = capsys.readouterr().out
    assert "✗ data" in out and "line 1: not JSON" in out
    assert "✗ four bit       ZeroDivisionError" in out and "✗ DPO step       not tried" in out


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    config = tiny(tmp_path, output_dir=tmp_path / "file" / "out")
    shape = type("Shape", (), {"model": type("M", (), {"config": None})})
    monkeypatch.setattr("quantpref.models.lora_weights", lambda *_: 1)
    found = list(verify_dpo_setup.run(preflight.disk, config, {"base": shape}))
    assert found[-1].status == "fail" and "NotADirectoryError" in found[-1].found


def test_errors_of_ours_are_shown_as_they_are():
    def failing(config, found):
        raise UserError("x.jsonl, line 3: wrong; correct it")
        yield

    [check] = verify_dpo_setup.run(failing, PRESETS["tiny"], {})
    assert check == Check("fail", "failing", "x.jsonl, line 3: wrong; correct it")
