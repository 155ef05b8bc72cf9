"""config.py: presets < --config file < flags, and every mistake is one line and exit status 2."""

import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from config import PRESETS, ROOT, Config, parse_config

SCRIPTS = ("verify_dpo_setup.py", "train_dpo.py", "evaluate_dpo.py")
# Another value for every field, on the command line and in a TOML file.
OTHER = {
    "data": ("mine.jsonl", '"mine.jsonl"', Path("mine.jsonl")),
    "test_data": ("test.jsonl", '"test.jsonl"', Path("test.jsonl")),
    "base_model": ("some/base", '"some/base"', "some/base"),
    "base_revision": ("abc123", '"abc123"', "abc123"),
    "backend": ("unsloth", '"unsloth"', "unsloth"),
    "output_dir": ("here", '"here"', Path("here")),
    "train_fraction": ("0.5", "0.5", 0.5),
    "validation_fraction": ("0.2", "0.2", 0.2),
    "split": ("time", '"time"', "time"),
    "split_seed": ("5", "5", 5),
    "max_shortcut": ("0.7", "0.7", 0.7),
    "response": ("verdict", '"verdict"', "verdict"),
    "max_length": ("99", "99", 99),
    "lora_r": ("4", "4", 4),
    "lora_alpha": ("8", "8", 8),
    "sft_adapter": ("theirs", '"theirs"', Path("theirs")),
    "sft_learning_rate": ("1e-3", "1e-3", 1e-3),
    "sft_epochs": ("9", "9", 9),
    "beta": ("2", "2", 2.0),
    "learning_rate": ("1e-6", "1e-6", 1e-6),
    "num_train_epochs": ("7", "7", 7),
    "effective_batch_size": ("16", "16", 16),
    "per_device_train_batch_size": ("4", "4", 4),
    "warmup_steps": ("0", "0", 0),
    "weight_decay": ("0", "0", 0.0),
    "save_steps": ("11", "11", 11),
    "seed": ("4294967295", "4294967295", 4294967295),
    "report_to": ("wandb", '"wandb"', "wandb"),
    "show": ("3", "3", 3),
    "adapter": ("mine=x", '["mine=x"]', ("mine=x",)),
    "precision": ("16bit", '["16bit"]', ("16bit",)),
    "base_model_16bit": ("some/base", '"some/base"', "some/base"),
    "runs": ("one", '["one"]', (Path("one"),)),
}
SWITCHES = [field.name for field in fields(Config) if field.type is bool]


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of flags that are refused with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        parse_config([*argv], "What this script does.")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert not re.search("[\x1b─-╿]", err)
    return err


# Values


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses(name):
    assert parse_config(["--preset", name], "") == parse_config([f"--preset={name}"], "") == PRESETS[name]


def test_the_default_preset_is_the_stated_experiment():
    config = parse_config([], "")
    assert config == PRESETS["llama3-8b"] == Config()
    assert (config.base_model, config.lora_r, config.lora_alpha) == ("unsloth/llama-3-8b-bnb-4bit", 16, 16)
    assert (config.beta, config.learning_rate, config.num_train_epochs) == (0.1, 5e-5, 3)
    assert (config.sft_learning_rate, config.sft_epochs, config.effective_batch_size) == (2e-4, 1, 8)
    assert (config.warmup_steps, config.weight_decay, config.save_steps, config.seed) == (5, 0.01, 100, 3407)
    assert (config.max_length, config.train_fraction, config.validation_fraction) == (2048, 0.7, 0.1)
    assert config.data == ROOT / "data" / "contrastive_rec_train.jsonl" and config.data.is_file()


def test_the_tiny_preset_is_the_embedded_one():
    config = PRESETS["tiny"]
    assert Path(config.base_model, "model.safetensors").is_file() and config.output_dir == Path("outputs/tiny")
    assert config.sft_more and config.num_train_epochs == config.sft_epochs == 1 and config.sft_learning_rate == 2e-3
    unchanged = {"base_model", "output_dir", "sft_learning_rate", "learning_rate", "num_train_epochs", "sft_more"}
    assert {f.name for f in fields(Config) if getattr(config, f.name) != getattr(Config(), f.name)} == unchanged


def test_every_field_has_another_value_here():
    assert OTHER.keys() | SWITCHES == {field.name for field in fields(Config)}
    assert all(value != getattr(Config(), name) for name, (_, _, value) in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("dash", ["-", "_"])
def test_every_flag_with_dashes_or_underscores(name, dash):
    text, _, value = OTHER[name]
    flag = "--" + name.replace("_", dash)
    for argv in ([f"{flag}={text}"], ["--preset", "tiny", flag, text], [flag, text, "--preset", "tiny"]):
        preset = PRESETS["tiny" if "tiny" in argv else "llama3-8b"]
        found = parse_config(argv, "")
        assert found == replace(preset, **{name: value})
        assert repr(getattr(found, name)) == repr(value)  # the type too


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    dashed = name.replace("_", "-")
    assert getattr(parse_config([f"--{dashed}"], ""), name) is True
    assert getattr(parse_config([f"--{name}"], ""), name) is True
    assert getattr(parse_config(["--preset", "tiny", f"--no-{dashed}"], ""), name) is False


@pytest.mark.parametrize("name", OTHER)
def test_presets_before_file_before_flags(tmp_path, name):
    text, toml, value = OTHER[name]
    file = tmp_path / "my.toml"
    file.write_text(f"{name} = {toml}\nsave_steps = 13\n" if name != "save_steps" else "save_steps = 11\n")
    from_file = parse_config(["--preset", "tiny", "--config", str(file)], "")
    assert from_file == replace(PRESETS["tiny"], **{"save_steps": 13, name: value})
    assert repr(getattr(from_file, name)) == repr(value)  # the type too
    back = getattr(PRESETS["tiny"], name)
    if back is not None:
        words = map(str, back) if isinstance(back, tuple) else [str(back)]
        by_flag = parse_config([f"--{name}", *words, f"--config={file}", "--preset=tiny"], "")
        assert getattr(by_flag, name) == back


def test_switches_in_a_file(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('sft_more = false\nretrain_sft = true\nper_device_train_batch_size = "auto"\n')
    found = parse_config(["--preset", "tiny", "--config", str(file)], "")
    assert found == replace(PRESETS["tiny"], sft_more=False, retrain_sft=True)
    assert parse_config(["--preset", "tiny", "--config", str(file), "--sft-more"], "").sft_more


def test_folders_follow_the_output_folder():
    config = parse_config(["--output-dir", "x"], "")
    names = [config.sft_folder, config.dpo_folder, config.sft_more_folder, config.evaluation_folder]
    assert [str(p) for p in names] == [
        "x/llama3_sft_4bit_final", "x/llama3_dpo_4bit_final", "x/llama3_sft_more_4bit_final", "x/evaluation"
    ]  # fmt: skip
    assert replace(config, sft_adapter=Path("y")).sft_folder == Path("y")


def test_as_json_is_plain():
    import json

    found = PRESETS["tiny"].as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {field.name for field in fields(Config)}
    assert found["output_dir"] == "outputs/tiny" and found["test_data"] is None


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus", "1"], "--bogus"),
        (["stray"], "stray"),
        (["--preset", "huge"], "--preset huge: unknown; choose one of llama3-8b, llama3.2-3b, llama3.2-1b, tiny"),
        (["--preset"], "--preset needs a value"),
        (["--config"], "--config needs a value"),
        (["--config", "gone.toml"], "gone.toml: cannot be read as TOML"),
        (["--config", "."], "cannot be read as TOML"),
        (["--beta", "x"], "--beta"),
        (["--beta"], "--beta"),
        (["--lora-r", "1.5"], "--lora-r"),
        (["--backend", "mlx"], "'auto', 'unsloth', 'transformers'"),
        (["--response", "short"], "--response"),
        (["--sft-more", "maybe"], "maybe"),
        (["--beta", "0"], "--beta must be above 0 and finite, found 0.0"),
        (["--beta", "nan"], "--beta must be above 0 and finite, found nan"),
        (["--learning-rate", "inf"], "--learning-rate must be above 0 and finite, found inf"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0"),
        (["--lora-r", "0"], "--lora-r must be above 0"),
        (["--num-train-epochs", "0"], "--num-train-epochs must be above 0"),
        (["--weight-decay", "-0.1"], "--weight-decay must be 0 or more"),
        (["--weight-decay", "inf"], "--weight-decay must be 0 or more and below inf, found inf"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--seed", "4294967296"], "--seed must be 0 or more and below 4294967296"),
        (["--split-seed", "99999999999"], "--split-seed must be 0 or more and below"),
        (["--train-fraction", "0.9"], "must leave a test part"),
        (["--train-fraction", "0"], "--train-fraction must be above 0"),
        (["--per-device-train-batch-size", "3"], "3 must divide --effective-batch-size"),
        (["--per-device-train-batch-size", "0"], "0 must divide --effective-batch-size"),
        (["--per-device-train-batch-size", "some"], "--per-device-train-batch-size"),
    ],
    ids=" ".join,
)
def test_wrong_flags_are_one_line(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_all_wrong_values_in_one_message(capsys):
    line = refused(capsys, "--beta", "0", "--seed", "-1", "--train-fraction", "2", "--save-steps", "0")
    assert all(name in line for name in ("--beta", "--seed", "--train-fraction", "--save-steps", "test part"))


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("learning_rat = 1", "unknown setting 'learning_rat'; did you mean learning_rate?"),
        ('colour = "red"', "unknown setting 'colour'"),
        ('preset = "tiny"', "unknown setting 'preset'"),
        ("learning-rate = 1", "unknown setting 'learning-rate'; did you mean learning_rate?"),
        ("beta 1", "cannot be read as TOML"),
        ("beta = 1\nbeta = 2", "cannot be read as TOML"),
        ('beta = "x"', "beta must be a number, found 'x'"),
        ("beta = true", "beta must be a number, found True"),
        ("beta = nan", "--beta must be above 0 and finite"),
        ("lora_r = 1.0", "lora_r must be a whole number, found 1.0"),
        ("lora_r = true", "lora_r must be a whole number, found True"),
        ("sft_more = 1", "sft_more must be true or false, found 1"),
        ("base_model = 5", "base_model must be a text, found 5"),
        ("base_revision = 5", "base_revision must be a text, found 5"),
        ("data = 5", "data must be a text, found 5"),
        ("test_data = []", "test_data must be a text, found []"),
        ('backend = "mlx"', "backend must be 'auto' or 'unsloth' or 'transformers', found 'mlx'"),
        ("backend = [1]", "backend must be 'auto'"),
        ('per_device_train_batch_size = "some"', "must be a whole number or 'auto', found 'some'"),
        ("per_device_train_batch_size = 2.0", "must be a whole number or 'auto', found 2.0"),
        ('adapter = "x"', "adapter must be a list, each a text, found 'x'"),
        ("runs = [1]", "runs must be a list, each a text, found [1]"),
        ('precision = ["8bit"]', "precision must be a list, each '4bit' or '16bit', found ['8bit']"),
        ('precision = [["4bit"]]', "precision must be a list"),
        ("[beta]\nx = 1", "beta must be a number"),
        ("seed = -1", "--seed must be 0 or more"),
    ],
)
def test_wrong_settings_in_a_file_are_one_line(capsys, tmp_path, toml, message):
    file = tmp_path / "my.toml"
    file.write_text(toml)
    line = refused(capsys, "--config", str(file))
    assert message in line
    assert "--" in message or str(file) in line


def test_a_file_of_another_encoding_is_one_line(capsys, tmp_path):
    (tmp_path / "my.toml").write_bytes("data = 'é'".encode("latin-1"))
    assert "cannot be read as TOML" in refused(capsys, "--config", str(tmp_path / "my.toml"))


# Help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_field_without_loading_torch(script):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--preset', 'tiny', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy', 'unsloth'} & sys.modules.keys()\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"COLUMNS": "200"})
    assert ended.returncode == 0 and ended.stderr == "[]\n"
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in ended.stdout
    assert all(name in ended.stdout for name in (*PRESETS, "--preset", "--config"))
    words = " ".join(re.sub("[─-╿]+", " ", ended.stdout).split())
    assert "Strength of the tie to the reference" in words
    assert (
        f"(default: {PRESETS['tiny'].learning_rate})" in words and "(default: 0.1)" in words
    )  # of the preset that was asked for


def test_help_is_quick():
    """Under 1.5 s; the best of three, since the machine may be shared."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "train_dpo.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1.5:
            break
    assert min(seconds) < 1.5


def test_an_unknown_flag_ends_a_script_with_one_line():
    ended = subprocess.run([sys.executable, "train_dpo.py", "--bogus"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ") and "--bogus" in ended.stderr


def test_a_path_that_the_locale_cannot_spell_is_refused(capsys):
    """In an ASCII locale an umlaut on the command line is two lone surrogates, which no file of ours could hold."""
    for flag in ("--output-dir", "--data", "--base-model", "--sft-adapter"):
        text = refused(capsys, flag, "run \udcc3\udcbc")
        assert f"{flag}: this locale cannot spell 'run \\udcc3\\udcbc'; set LC_ALL=C.UTF-8" in text
