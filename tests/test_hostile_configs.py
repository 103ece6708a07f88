"""Configs that mean harm, or are merely broken: no code runs, nothing is written, no secret is told."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from configs import yaml_file
from configs.arguments import make_config, parse, to_yaml
from configs.errors import ConfigError
from configs.options import Config
from configs.secrets import hide_in_command, hide_secrets, holds_secret
from scripts.report import fail
from tests.conftest import ROOT

Say = Callable[..., str]
TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqR" + "sTuVwXyZ01234567"  # in two halves, so that no scanner takes it for a real one


@pytest.fixture
def said_by(capsys: pytest.CaptureFixture[str]) -> Say:
    """What parse says in refusing a command line: one short block."""

    def say(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(list(argv))
        printed, said = capsys.readouterr()
        assert (stop.value.code, printed) == (2, "")
        assert said.startswith("error: ") and "Traceback" not in said
        lines = said.splitlines()
        assert len(lines) <= 4 and all(len(line) <= 200 or "where:" in line for line in lines), said
        return said

    return say


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a config in an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return Path("c.yaml")


# Secrets


SECRETS = {  # a text, and the part of it that nobody may see
    f"{TOKEN}": TOKEN,
    f"name/{TOKEN}/x": TOKEN,
    "hf_" + "a" * 34: "a" * 34,
    f"https://{TOKEN}@host/x": TOKEN,
    "https://me:s3same@host/x.parquet": "s3same",
    "https://me:s3/same@host/x": "s3/same",
    "https://me:s3@same@host/x": "same",
    "https://:s3same@host/x": "s3same",
    "HTTPS://s3same@host/x": "s3same",
    "s3://me:s3same@bucket/x": "s3same",
    "simplecache::ftp://me:s3same@host/x": "s3same",
    "https://host/x?token=s3same": "s3same",
    "https://host/x?a=1&access_token=s3same&b=2": "s3same",
    "https://host/x?accessToken=s3same": "s3same",
    "https://host/x#api_key=s3same": "s3same",
    "https://host/x?X-Amz-Date=1&X-Amz-Signature=s3same": "s3same",
    "https://host/x?X-Amz-Security-Token=s3same": "s3same",
    "https://host/x?X-Goog-Credential=s3same": "s3same",
    "https://host/x?sv=2024&sig=s3same": "s3same",
    "https://host/x?AWSAccessKeyId=s3same": "s3same",
    "https://host/x?password=s3same": "s3same",
    "https://host/x%3Ftoken=s3same": "s3same",
    "https%3A%2F%2Fme:s3same@host": "s3same",
    "ghp_" + "a1B2" * 9: "a1B2a1B2",
    "github_pat_" + "a1B2" * 9: "a1B2a1B2",
    "AKIA" + "A1B2" * 4: "A1B2A1B2",
    "wandb_v1_" + "a1B2" * 9: "a1B2a1B2",
}
NO_SECRETS = """
https://host:8080/a@v1/x.parquet | https://host/x.parquet?download=true | https://host/x?tokenizer=bert&author=me
hf://datasets/user/name@refs%2Fconvert%2Fparquet/x.parquet | hf://datasets/user/name@0123456789abcdef/data/*.parquet
zip://inner.csv::hf://datasets/user/name@rev/x.zip | file:///C:/x@y | ssh://git@github.com/x | https://[::1]:80/x@y
hf_cifar10_resnet18_224 | hf_internal_testing/tiny | hf_imagenet1k | hf_internaltestingdata | C:\\data@home\\x
user@example.com/data | data/train-?.parquet | data/[ab]?/key=3/part.parquet | /mnt/token/secrets/password | a::b@c
~/.cache/huggingface/hub/snapshots/0123456789abcdef0123456789abcdef01234567/x | s3://bucket/key/data@2.parquet
Étude d’été 🎉 | runs/token=3/x | 0123456789abcdef0123456789abcdef01234567 | uoft-cs/cifar10 | tokens
"""


@pytest.mark.parametrize("text", SECRETS)
def test_an_option_that_holds_a_secret_is_refused_without_telling_it(text: str, said_by: Say, file: Path):
    file.write_text(yaml.safe_dump({"lr": 1.0, "data_files": ["a.parquet", text]}))
    told = [
        said_by("--dataset", text),
        said_by(f"--mix-datasets={text}"),
        said_by("--output_dir", text),
        said_by("--resume", text),
        said_by("--config", str(file)),
        said_by("--config", text),
    ]
    with pytest.raises(ConfigError) as error:
        make_config(wandb_project=text)
    for said, name in zip(
        [*told, str(error.value)],
        ["dataset", "mix_datasets", "output_dir", "resume", "data_files", "config", "wandb_project"],
    ):
        assert SECRETS[text] not in said
        assert f"--{name} holds a token, a password or a signature" in said
        for cure in ("HF_TOKEN", "WANDB_API_KEY", "~/.netrc", "hf auth login"):
            assert cure in said
    assert str(file) in told[4]


@pytest.mark.parametrize("text", [text for text in SECRETS if "%" not in text])
def test_a_text_is_shown_without_its_secrets(text: str):
    assert SECRETS[text] not in hide_secrets(f"cannot open {text}: refused")
    assert hide_secrets(f"cannot open {text}: refused").startswith("cannot open ")


@pytest.mark.parametrize("text", [text.strip() for text in re.split(r"[|\n]", NO_SECRETS) if text.strip()])
def test_ordinary_names_and_paths_hold_no_secret(text: str):
    assert not holds_secret(text)
    assert hide_secrets(text) == text
    assert make_config(dataset=text).dataset == text


def test_a_fault_never_repeats_a_secret(said_by: Say, file: Path):
    for flags in (
        ["--token", "s3same"],
        ["--hf-token=s3same"],
        ["--wandb_api_key", "s3same", "--lr", "1"],
        ["s3same"],
        ["--lr", "1", "s3same"],
        ["--no_debug", "s3same"],
        ["--split", "0.8", "0.2", "0", "s3same"],
        ["--epochs", TOKEN],
        ["--optimizer", TOKEN],
        ["--use_wandb", TOKEN],
        [f"--{TOKEN}"],
        [TOKEN],
        ["--experiment_name", f"../{TOKEN}"],
    ):
        said = said_by(*flags)
        assert "s3same" not in said and TOKEN[3:] not in said, flags
    for text in (
        "hf_token: s3same",
        "token: s3same\nlr: [1,",
        "lr: 1\n\ttoken: s3same",
        'lr: 1\npassword: "s3same',
        "lr: s3same: s3same",
        f"lr: {TOKEN}",
        f"{TOKEN}: 3",
        f"lr: !{TOKEN} 3",
        f"lr: *{TOKEN}",
        f"%YAML {TOKEN}\n---\nlr: 1",
        f"- {TOKEN}",
        TOKEN,
    ):
        file.write_text(text)
        said = said_by("--config", str(file))
        assert str(file) in said
        assert "s3same" not in said and TOKEN[3:] not in said, text


def test_a_folder_named_by_a_secret_is_not_told(said_by: Say, file: Path, monkeypatch: pytest.MonkeyPatch):
    run = file.absolute().parent / TOKEN / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("lr: fast")
    monkeypatch.chdir(run.parent)
    said = said_by("--resume", "run")
    assert "--lr" in said and "run/config.yaml:1" in said and TOKEN not in said
    with pytest.raises(ConfigError) as error:
        make_config(**{TOKEN: 1})
    assert TOKEN not in str(error.value)


def test_a_flag_or_key_named_like_a_secret_is_told_where_secrets_belong(said_by: Say, file: Path):
    file.write_text("wandb_api_key: x")
    for said in (said_by("--token", "x"), said_by("--hf-token=x"), said_by("--config", str(file))):
        assert "HF_TOKEN" in said and "WANDB_API_KEY" in said
    assert "HF_TOKEN" not in said_by("--tokenizer", "x")


def test_a_command_line_is_shown_without_its_secrets():
    command = "--token abc --lr 3 --hf-token=d --key_frames 5 --password -e WANDB_API_KEY=f --x https://u:g@h/i --y j"
    shown = (
        "--token *** --lr 3 --hf-token=*** --key_frames 5 --password *** WANDB_API_KEY=*** --x https://***@h/i --y j"
    )
    assert hide_in_command(command.split()) == shown.split()


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_the_network_is_told_without_the_signature(debug: bool, capsys: pytest.CaptureFixture[str]):
    try:
        raise OSError("403 for https://host/x?X-Amz-Signature=s3same&b=2, sent by me with " + TOKEN)
    except OSError as error:
        assert fail(error, debug=debug) == 1
    said = capsys.readouterr().err
    assert "s3same" not in said and TOKEN not in said
    assert ("Traceback" in said) == debug


# Names


HOSTILE_NAMES = [
    *("..", ".", "../x", "../../etc/x", "a/../../x", "a/b", "/etc/x", "/", "//x", "~", "~/x", "~root", "$HOME"),
    *("a\\b", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "file:///etc/x", "a\0b", "\0", "a\nb", "\n", "a\r\nb", "a\tb"),
    *("\x1b[2J", "\x7f", "\x85", "\u2028", "\udcff", "a" * 300, "a" * 5000, "a/" * 3000, "-rf", "--help", "-", "--"),
    *("CON", "con", "nul.txt", "COM1", "lpt9.a.b", "a∕b", "a／b", "․․", "‥", "🎉", "é", "a\u202eb", "a.", "a..", "a "),
    *(" a", " ", "", ".git", ".hidden", "a:b", "a*b", "a?b", "a|b", "<a>", 'a"b', "a'b", "`id`", "$(id)", "a;b", "a&b"),
    *("%2e%2e%2fx", "user/name/x", "user/..", "../name", "user/-x", "x.git", "a--b", "user/", "/name", "None", "null"),
]


def accepted(tmp_path: Path, name: str, text: str) -> Config | None:
    """The config, or None where it is refused: the same by flag, by YAML and in code."""
    outcomes: list[Any] = []
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({name: text}), encoding="utf-8", errors="surrogatepass")
    for make in (
        lambda: make_config(**{name: text}),
        lambda: parse([f"--{name}={text}"]),
        lambda: parse(["--config", str(tmp_path / "c.yaml")]),
    ):
        try:
            outcomes.append(make())
        except (ConfigError, SystemExit) as error:
            assert isinstance(error, ConfigError) or error.code == 2
            outcomes.append(None)
    if text != "None":  # the flags' word for nothing
        assert outcomes[0] == outcomes[1] == outcomes[2], text
    return outcomes[0]


@pytest.mark.parametrize("text", HOSTILE_NAMES)
def test_no_name_leads_out_of_its_folder(text: str, tmp_path: Path):
    assert len(HOSTILE_NAMES) >= 60
    root = tmp_path / "runs"
    root.mkdir()
    if accepted(tmp_path, "experiment_name", text):
        (root / text).mkdir()
        assert [path.name for path in root.iterdir()] == [text]
        assert re.fullmatch(r"\w[\w.-]{0,98}[\w-]|\w", text, re.ASCII)
        assert text.split(".")[0].upper() not in ("CON", "NUL", "COM1", "LPT9")
    if config := accepted(tmp_path, "output_dir", text):
        path = Path(config.output_dir)  # wherever it leads, it is one path of this system and no flag
        assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text)) and not text.startswith("-")
        os.fsencode(path)
    if accepted(tmp_path, "hub_model_id", text):
        validate_repo_id(text)
        assert text.count("/") <= 1 and ".." not in text
    if accepted(tmp_path, "wandb_project", text):
        wandb.Settings(project=text)
        assert set(text) != {"."}


def test_good_names_are_taken(tmp_path: Path):
    for text in ("a", "run.1", "2024-01-01_x", "_", "v1-", "None", "console", "a" * 100):
        assert accepted(tmp_path, "experiment_name", text), text
    for text in ("runs", "/data/runs", "../runs", "~/runs", "my runs", "Läufe/🎉", "./-x", "C:\\runs", "a" * 255):
        assert accepted(tmp_path, "output_dir", text), text
    for text in ("user/name", "name", "a-b/c_d.e-1", "A/" + "b" * 90):
        assert accepted(tmp_path, "hub_model_id", text), text
        validate_repo_id(text)
    for text in ("project", "my project", "Versuch-1", "é🎉", "a.b"):
        assert accepted(tmp_path, "wandb_project", text), text


@pytest.mark.parametrize("text", ["user/..", "a--b", "user/-x", "x/y/z", "-a", "a.", "a-", "a.git", "x" * 97])
def test_names_of_repositories_that_the_hub_refuses_are_refused(text: str):
    with pytest.raises(HFValidationError):
        validate_repo_id(text)
    with pytest.raises(ConfigError):
        make_config(hub_model_id=text)


@pytest.mark.parametrize("name", [field.name for field in fields(Config) if "str" in str(field.type).split("[")[0]])
def test_no_text_option_takes_a_line_break_or_nul(name: str):
    for text in ("a\0b", "a\nb", "a\x1b[2Jb"):
        with pytest.raises(ConfigError, match=f"--{name} holds .* at place 2"):
            make_config(**{name: text})


def test_the_config_of_a_long_list_of_files_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    taken = make_config(data_files=[f"data/train-{number:05d}-of-05000.parquet" for number in range(4000)])
    taken = make_config(data_files=tuple(taken.data_files))
    Path("c.yaml").write_text(to_yaml(taken), encoding="utf-8")
    assert parse(["--config", "c.yaml"]) == taken
    with pytest.raises(ConfigError, match="--data_files lists 20,000 names"):
        make_config(data_files=("data/train.parquet",) * 20_000)


# Broken and hostile files


HOSTILE_FILES: dict[str, tuple[str | bytes, str]] = {  # what it is: the file, and what the fault names
    "object": ("!!python/object/apply:os.system ['touch made']", "os.system"),
    "object as a value": ("weights: !!python/object/apply:os.system ['touch made']", "--weights"),
    "object of a name": ("weights: !!python/name:antigravity.fly", "--weights"),
    "module": ("weights: !!python/module:antigravity ''", "--weights"),
    "object in a list": ("data_files: [a, !!python/object/new:os.system ['touch made']]", "--data_files"),
    "object as a list": ("data_files: !!python/tuple [a]", "--data_files"),
    "tag of a key": ("!!python/name:antigravity.fly lr: 1", "lr"),
    "tag of the file": ("!!python/object:antigravity.X\nlr: 1", "antigravity.X"),
    "class path": ("optimizer: torch.optim.Adam", "--optimizer"),
    "target": ("_target_: os.system", "_target_"),
    "class_path": ("model:\n  class_path: antigravity.X\n  init_args: {}", "--model"),
    "merge": ("<<: {lr: 1}", "<<"),
    "flag in a list": ("data_files: [a, --experiment_name, x]", "--data_files"),
    "help in a list": ("data_files: [a, --help]", "--data_files"),
    "flag in a value": ("dataset: --help", "--dataset"),
    "duplicate": ("lr: 1\nepochs: 3\nlr: 2", "lr stands twice, also on line 1"),
    "duplicate in quotes": ("lr: 1\n'lr': 2", "lr stands twice"),
    "alias of itself": ("data_files: &a [*a]", "--data_files"),
    "unknown alias": ("lr: *a", "YAML"),
    "list of lists": ("data_files: [[a]]", "--data_files"),
    "list as a key": ("? [a]\n: 3", "unknown key"),
    "mapping as a key": ("? {a: b}\n: 3", "unknown key"),
    "number as a key": ("3: 4", "unknown key '3'"),
    "null as a key": ("null: 4", "unknown key 'null'"),
    "true as a key": ("yes: 4", "unknown key 'yes'"),
    "key of a class": ("__class__: 4", "unknown key '__class__'"),
    "key of a method": ("__post_init__: 4", "unknown key '__post_init__'"),
    "key in dashes": ("batch-size: 4", "batch_size"),
    "huge integer": ("epochs: 1" + "0" * 400, "--epochs is too large"),
    "huger integer": ("seed: " + "9" * 6000, "--seed"),
    "huge float": ("lr: 1e400", "--lr"),
    "nan": ("lr: .nan", "--lr"),
    "nan by its flag's word": ("lr: nan", "--lr is nan"),
    "infinite": ("lr: inf", "--lr"),
    "minus infinite": ("min_delta: -.inf", "--min_delta"),
    "base 60": ("epochs: 1:30", "--epochs"),
    "hexadecimal": ("epochs: 0x10", "--epochs"),
    "date": ("epochs: 2026-01-01", "--epochs"),
    "impossible date": ("epochs: 2026-13-45", "--epochs"),
    "impossible time": ("lr: 2026-01-01 25:61:61", "--lr"),
    "binary": ("weights: !!binary '%%%'", "--weights"),
    "set": ("data_files: !!set {a, b}", "--data_files"),
    "null": ("output_dir: null", "--output_dir"),
    "nothing": ("lr:", "--lr"),
    "null in a list": ("data_files: [a, null]", "--data_files"),
    "bool for text": ("dataset: no", "--dataset"),
    "text for bool": ("use_wandb: 'perhaps'", "--use_wandb"),
    "number for bool": ("use_wandb: 1", "--use_wandb"),
    "list for bool": ("use_wandb: [true]", "--use_wandb"),
    "mapping": ("lr: {a: 1}", "--lr"),
    "long string": ("weights: " + "a" * 100_000, "--weights"),
    "long texts": (f"resume: {'a' * 4000}\nexperiment_name: x", "--resume"),
    "long key": ("a" * 1000 + ": 1", "unknown key 'aaa"),
    "long choice": ("optimizer: " + "a" * 100_000, "--optimizer"),
    "tab": ("lr: 1\n\tepochs: 3", "YAML"),
    "escape of a surrogate": ('weights: "\\ud800"', "--weights"),
    "escape of no character": ('weights: "\\UFFFFFFFF"', "YAML"),
    "escape of NUL": ('output_dir: "a\\0b"', "--output_dir"),
    "two lines": ("output_dir: |\n  a\n  b", "--output_dir"),
    "NUL": (b"lr: 1\0", "control character"),
    "escape character": (b"weights: \x1b[2J", "control character"),
    "latin-1": ("weights: é".encode("latin-1"), "UTF-8"),
    "UTF-16": ("lr: 1".encode("utf-16"), "UTF-8"),
    "random bytes": (random.Random(0).randbytes(1000), "UTF-8"),
    "zip": (b"PK\x03\x04\0\0", "control character"),
    "two documents": ("lr: 1\n---\nlr: 2", "YAML"),
    "directive": ("%YAML 9" + "9" * 5000 + ".1\n---\nlr: 1", "YAML"),
    "nested lists": ("data_files: " + "[" * 50_000, "nested"),
    "nested mappings": ("{a: " * 20_000, "nested"),
    "nested blocks": ("- " * 20_000, "nested"),
    "quotes": ("weights: '" + "a" * 1000, "YAML"),
    "text": ("hello", "key: value"),
    "list": ("- lr", "key: value"),
    "too large": ("#" * 300_000, "256 KiB"),
}


@pytest.mark.parametrize("what", HOSTILE_FILES)
def test_a_hostile_file_is_refused_in_one_block(what: str, said_by: Say, file: Path):
    content, named = HOSTILE_FILES[what]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = set(sys.modules)
    said = said_by("--config", str(file))
    assert str(file) in said and named in said
    assert os.listdir() == ["c.yaml"]  # no file was made
    assert set(sys.modules) <= before  # no module was imported


def test_a_config_that_is_no_file_is_refused(said_by: Say, file: Path):
    assert "directory" in said_by("--config", str(file.absolute().parent))
    assert "KiB" in said_by("--config", "/dev/zero")
    assert "No such file" in said_by("--config", "nowhere.yaml")
    assert "too long" in said_by("--config", "a" * 300)
    for path in ("", "a\0b", "a\nb", "-x"):
        assert "--config" in said_by(f"--config={path}")
    loop = Path("loop")
    loop.symlink_to(loop)
    for path in ("loop", "a" * 300, "a\0b", "", "nowhere"):
        assert "--resume" in said_by(f"--resume={path}")
    assert "--config" in said_by("--config", "--lr", "3")


def test_an_unreadable_config_is_named(said_by: Say, file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file.write_text("lr: 1")
    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in said_by("--config", str(file))


def test_a_bomb_of_aliases_takes_no_memory(said_by: Say, file: Path):
    names = ["data_files", "mix_datasets", *"abcdefghijklmnopqrst"]
    lines = ["data_files: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"{name}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]" for i, name in enumerate(names[1:])]
    file.write_text("\n".join(lines))
    tracemalloc.start()
    assert "--mix_datasets" in said_by("--config", str(file))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["", "\n\n", "# only a remark", "---\n", "---\n...\n", "\ufeff", "{}", "null", "~"])
def test_an_empty_file_changes_nothing(text: str, file: Path):
    file.write_text(text, encoding="utf-8")
    assert parse(["--config", str(file)]) == Config()


def test_harmless_forms_of_yaml_are_read(file: Path):
    file.write_text(
        '\ufefflr: &rate 1_0.5\nmin_delta: *rate\n"epochs": "7"\nexperiment_name: 007\nweights: ~\n'
        "dataset: 2024-01-01\ndata_files: one.tar\nmix_datasets: ['no', b]\nuse_wandb: on\ndeterministic: No\n"
        'split: [1, 0, 0]\noutput_dir: "L\\u00e4ufe"\nmonitor: >-\n  loss\n',
        encoding="utf-8",
    )
    expected = make_config(
        lr=10.5, min_delta=10.5, epochs=7, experiment_name="007", dataset="2024-01-01", data_files=("one.tar",),
        mix_datasets=("no", "b"), use_wandb=True, split=(1.0, 0.0, 0.0), output_dir="Läufe", monitor="loss",
    )  # fmt: skip
    assert parse(["--config", str(file)]) == expected


def test_a_fault_between_a_file_and_flags_is_judged_by_what_comes_out(said_by: Say, file: Path):
    file.write_text("val_data_dir: val\nmixup: 0.2\nbatch_size: 33\n")
    config = parse(["--config", str(file), "--train_data_dir", "train", "--batch_size", "32"])
    assert (config.val_data_dir, config.batch_size) == ("val", 32)
    assert str(file) in said_by("--config", str(file))
    assert str(file) not in said_by("--config", str(file), "--lr", "nan")


# Fuzzing


NAMES = [field.name for field in fields(Config)]
GOOD_LINES = [line for line in to_yaml(Config()).splitlines() if ":" in line and not line.endswith(":")]
WORDS = [
    *("1", "0", "-1", "3.5", "1e-3", "1e999", "nan", ".inf", "-.inf", "inf", "0x1F", "1:30", "1_000", "9" * 25),
    *(
        "9" * 5000,
        "",
        " ",
        "~",
        "null",
        "None",
        "yes",
        "no",
        "true",
        "off",
        "2026-01-01",
        "2026-99-99",
        "'",
        '"',
        "'a'",
    ),
    *('"\\x"', '"\\0"', '"\\uD800"', '"\\UFFFFFFFF"', "a\tb", "a\nb", "a\0b", "\ufeff", "🎉", "\u2028", "é" * 200),
    *(
        "a" * 5000,
        "[",
        "]",
        "[1, 2, 3]",
        "[]",
        "[[]]",
        "[null]",
        "[a, --help]",
        "{a: 1}",
        "{}",
        "&a 1",
        "*a",
        "&a [*a]",
    ),
    *(
        "!!int 3",
        "!x 3",
        "!!set {a}",
        "!!python/object/apply:os.system ['touch made']",
        "!!python/name:antigravity.fly",
    ),
    *("!!python/module:this", "| \n a", "> b", "-", "--", "- a", "? a", ": a", "# a", "%", "@a", "`a`", "a: b", "a#b"),
    *(
        "<<",
        "../x",
        "/etc/x",
        "~root",
        "$(touch made)",
        "adamw",
        "auto",
        "cosine",
        "digits",
        "simple_cnn",
        "0.8 0.1 0.1",
    ),
    *(f"https://me:{TOKEN}@h/", "--lr", "=", "=1", "\\", "\r"),
]
KEYS = [*NAMES * 2, *WORDS, "batchsize", "LR", "lr ", "config", "print_config", "resume", "__init__", "hf_token"]


def a_broken_file(draw: random.Random) -> bytes:
    """Good options, a few that are mostly not, then changes at random places."""
    lines = draw.sample(GOOD_LINES, draw.randrange(10))
    for _ in range(draw.choice([0, 1, 1, 2])):
        key = draw.choice(KEYS) if draw.random() < 0.3 else draw.choice(NAMES)
        lines.append(key + draw.choice([": ", ": ", ": ", ":", " : ", " "]) + draw.choice(WORDS))
    draw.shuffle(lines)
    content = bytearray(draw.choice(["\n", "\n", "\n", "\r\n", "\n  ", ", "]).join(lines).encode("utf-8"))
    for _ in range(draw.choice([0, 0, 0, 1, 2, 8])):
        place = draw.randrange(len(content) + 1)
        change = draw.choice(
            [
                bytes([draw.randrange(256)]),
                draw.choice(WORDS).encode()[:50],
                b"[" * draw.choice([1, 3, 300]),
                draw.choice([b"\0", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"---\n", b"...\n", b"\n", b"!!", b"&", b"*"]),
            ]
        )
        content[place : place + draw.choice([0, 0, 1, 5])] = change
    return bytes(content)


def broken_flags(draw: random.Random) -> list[str]:
    """Good flags, then some that are mostly not."""
    others = [
        "--tyro-write-completion",
        "--tyro-print-completion",
        "--token",
        "@file",
        "-lr",
        "--no_lr",
        "--no_no_debug",
    ]
    flags = ["--lr", "0.1", "--dataset=digits", "--use_wandb"][: draw.randrange(5)]
    for _ in range(draw.choice([1, 1, 2, 3])):
        name = draw.choice(KEYS) if draw.random() < 0.3 else draw.choice(NAMES)
        flag = draw.choice(others) if draw.random() < 0.1 else draw.choice(["--", "--", "--", "--no_"]) + name
        values = [draw.choice(WORDS) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
        flags += [f"{flag}={values[0]}"] if values and draw.random() < 0.5 else [flag, *values]
    if draw.random() < 0.1:
        flags.insert(0, draw.choice(WORDS))
    return flags


def outcome(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Config | str:
    """The config, or the block that refuses it."""
    try:
        return parse(argv)
    except SystemExit as stop:
        printed, said = capsys.readouterr()
        assert stop.code == 2 or (stop.code == 0 and {"--print_config", "--help"} & set(argv) and printed), argv
        lines = said.splitlines()
        assert len(lines) <= 4 and all(len(line) <= 200 for line in lines), said
        assert TOKEN[3:] not in said
        return said


@pytest.mark.parametrize("cases", [600, pytest.param(20_000, marks=pytest.mark.long)])
def test_a_broken_file_gives_a_config_or_one_block(cases: int, file: Path, capsys: pytest.CaptureFixture[str]):
    draw, configs = random.Random(cases), 0
    before = set(sys.modules)
    for _ in range(cases):
        content = a_broken_file(draw)
        file.write_bytes(content)
        found = outcome(["--config", str(file)], capsys)
        if isinstance(found, Config):
            configs += 1
            file.write_text(to_yaml(found), encoding="utf-8")
            assert parse(["--config", str(file)]) == found, content
        else:
            assert found.startswith("error: ") and str(file) in found, content
            line = re.search(re.escape(str(file)) + r":\d+", found)
            assert line or any(name in found for name in [*NAMES, "YAML", "nested", "key: value"]), found
        assert os.listdir() == [str(file)]
    assert set(sys.modules) <= before
    assert 0.05 * cases < configs < 0.95 * cases  # both kinds were tried


@pytest.mark.parametrize("cases", [600, pytest.param(20_000, marks=pytest.mark.long)])
def test_broken_flags_give_a_config_or_one_block(cases: int, file: Path, capsys: pytest.CaptureFixture[str]):
    draw, configs = random.Random(cases), 0
    before = set(sys.modules)
    for _ in range(cases):
        flags = broken_flags(draw)
        found = outcome(flags, capsys)
        if isinstance(found, Config):
            configs += 1
        elif found:
            assert found.startswith("error: ") and any(w in found for w in ("--", "word 1", "config")), flags
        assert os.listdir() == []
    assert set(sys.modules) <= before
    assert 0.03 * cases < configs < 0.95 * cases


def test_flags_and_files_type_a_value_alike(file: Path, capsys: pytest.CaptureFixture[str]):
    plain = [word for word in WORDS if re.fullmatch(r"[\w.+/-][\w.+/$()-]*", word)]
    for name in sorted(set(NAMES) - {"resume"}):  # a flag that names a run is looked for at once
        for word in plain:
            file.write_text(f"{name}: '{word}'", encoding="utf-8")
            by_file, by_flag = outcome(["--config", str(file)], capsys), outcome([f"--{name}={word}"], capsys)
            assert type(by_file) is type(by_flag), (name, word)
            assert by_file == by_flag or isinstance(by_flag, str), (name, word)


def test_texts_survive_being_saved(file: Path):
    draw = random.Random(0)
    for _ in range(200):
        blocks = [draw.choice([(32, 127), (0xA0, 0x2000), (0x1F300, 0x1F600)]) for _ in range(draw.randrange(1, 20))]
        signs = [chr(draw.randrange(*block)) for block in blocks]
        text = "x" + "".join(signs)
        config = make_config(dataset=text, weights=text[:5], data_files=(text, "x" + text[::-1]))
        file.write_text(to_yaml(config), encoding="utf-8")
        assert parse(["--config", str(file)]) == config


def test_a_hostile_file_ends_the_script_before_anything_is_made(tmp_path: Path):
    for name in ("object", "impossible date", "flag in a list"):
        (tmp_path / "c.yaml").write_text(str(HOSTILE_FILES[name][0]))
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "c.yaml"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert os.listdir(tmp_path) == ["c.yaml"]


def test_the_module_that_reads_yaml_builds_no_objects():
    """compose gives a tree of texts; load, even safe_load, builds values."""
    text = Path(yaml_file.__file__).read_text()
    assert re.findall(r"yaml\.(\w*(?:load|parse|compose|Loader)\w*)", text) == ["compose", "SafeLoader"]
