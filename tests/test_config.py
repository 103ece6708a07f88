"""Flags, YAML and their faults."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from configs.arguments import make_config, parse, to_yaml
from configs.errors import ConfigError
from configs.options import Config
from tests.conftest import ROOT

# Every flag is a promise to its users: a new one goes in here on purpose, and none leaves unnoticed.
FLAGS = """
augment augment_rare auto_micro_batch batch_size batch_size_schedule cache channels channels_last check class_weights
compile cpu_threads cutmix data_files dataset debug decay_epochs decay_factor deterministic distill_temperature
distill_weight dropout dtype early_stopping ema_decay epochs expect_processes experiment_name find_unused_parameters
freeze_epochs fresh grad_clip gradient_checkpointing group_column hub_model_id image_column image_size keep_best
keep_last label_column label_columns label_smoothing labels layer_decay log_every loss_weights lr lr_scale
max_bad_fraction max_nonfinite max_steps micro_batch_size min_delta mix_datasets mix_off_epoch mix_weights
mixed_precision mixup model model_args momentum monitor monitor_mode nonfinite num_classes num_workers optimizer
output_dir patience pretrained push_to_hub random_erasing resume sampling save_every_minutes save_every_steps scheduler
seed shuffle_buffer split split_seed stop_after_steps streaming swa_lr swa_start_epoch sync_batch_norm task teacher
test_data_dir trace_samples train_data_dir use_multigpu use_tensorboard use_wandb val_data_dir wandb_project
warmup_steps weight_decay weights
""".split()


def test_the_flags_are_those_that_were_promised():
    assert sorted(field.name for field in fields(Config)) == FLAGS


def test_every_field_is_read_somewhere():
    sources = [path for folder in ("trainer", "models", "data", "scripts") for path in (ROOT / folder).glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    unread = [f.name for f in fields(Config) if not re.search(rf"(config|plain)\.{f.name}\b", text)]
    assert unread == []


def test_every_field_has_a_docstring():
    tree = ast.parse((ROOT / "configs" / "options.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), field.target


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "lr: 1e-3\nepochs: 7\nmixed_precision: no\nuse_wandb: true\nsplit: [0.5, 0.25, 0.25]\nweights: null\n"
    )
    config = parse(["--epochs", "8", "--config", str(file), "--no_use_wandb"])
    assert (config.lr, config.epochs, config.mixed_precision, config.use_wandb) == (0.001, 8, "no", False)
    assert config.split == (0.5, 0.25, 0.25)
    assert config.weights is None
    assert config.batch_size == Config().batch_size


def test_bare_flags_and_dashes():
    config = parse(["--mixed-precision", "--grad_clip", "--lr=0.5"])
    assert (config.mixed_precision, config.grad_clip, config.lr) == ("auto", 1.0, 0.5)
    assert parse(["--grad_clip", "0.3"]).grad_clip == 0.3
    assert parse(
        ["--use_wandb", "--no-use-wandb", "--weights", "None", "--data_files", "a", "b", "--mix_datasets"]
    ) == (make_config(data_files=("a", "b")))
    assert parse(["--config", f"{ROOT}/configs/cifar10.yaml", "--grad_clip", "None", "--lr", "1", "--lr", "2"]).lr == 2
    assert parse(["--config", f"{ROOT}/configs/cifar10.yaml", "--grad_clip", "None"]).grad_clip is None


def test_a_saved_config_loads_back(tmp_path):
    config = make_config(lr=1e-5, split=(0.6, 0.2, 0.2), experiment_name="x", grad_clip=0.1, weights="a: b")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("batchsize: 3", ["unknown key 'batchsize'", "batch_size"]),
        ("lr: abc", ["--lr", "abc"]),
        ("optimizer: adamm", ["--optimizer", "adamm", "adamw"]),
        ("split: [0.5, 0.6, 0.1]", ["--split", "0.5 0.6 0.1", "1.2"]),
        ("use_wandb: maybe", ["use_wandb", "maybe"]),
        ("epochs: 1.5", ["--epochs", "1.5"]),
        ("output_dir: null", ["output_dir", "null"]),
        ("train_data_dir: yes", ["train_data_dir", "true"]),
        ("lr: [1]", ["--lr", "list"]),
        ("split: [.nan, .nan, .nan]", ["--split", "nan"]),
        ("- 3", ["key: value", "list"]),
        ("lr: [1,", ["YAML"]),
        ("!!python/object/apply:os.system ['echo hi']", ["the tag", "os.system"]),
    ],
)
def test_a_fault_in_yaml_names_key_file_and_value(tmp_path, capsys, yaml, words):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml)
    with pytest.raises(SystemExit) as stop:
        parse(["--config", str(file)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    for word in [*words, str(file)]:
        assert word in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batchsize", "3"], ["unknown flag --batchsize", "did you mean batch_size"]),
        (["--lr", "abc"], ["--lr", "abc"]),
        (["--epochs", "0"], ["--epochs is 0"]),
        (["--lr", "nan"], ["--lr is nan"]),
        (["--mixup", "0.2", "--batch_size", "33"], ["even", "33"]),
        (["--push_to_hub"], ["--hub_model_id"]),
        (["--experiment_name", "../x"], ["'../x'", "safe"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--resume", "nowhere"], ["nowhere", "neither a run folder nor a checkpoint"]),
    ],
)
def test_a_fault_in_flags_answers_at_once_without_a_traceback(flags, words):
    command = [sys.executable, "-X", "importtime", "scripts/train.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stdout + done.stderr
    assert not re.search(r"\| +(torch|numpy|datasets)$", done.stderr, re.MULTILINE)  # their imports take seconds


def test_parsing_imports_no_torch():
    code = (
        "import sys; from configs.arguments import parse; parse(['--lr', '3']); "
        "slow = {'torch', 'accelerate', 'datasets', 'numpy', 'tyro'}; "
        "sys.exit(len(slow & {name.split('.')[0] for name in sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError) as error:
        make_config(learning_rate=1, lrr=2)
    assert "learning_rate" in str(error.value)
