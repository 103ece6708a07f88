"""What the README says, done."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.flags_table import BEGIN, END, table
from tests import guarantees, test_guarantees
from tests.conftest import ROOT, lines_of, run_script
from trainer.run_folder import MAY_CHANGE

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)
# By the name of the file: what it holds, what is added to tables, and the flags of the command.
CHANGES = {
    match[1]: match.groups()[1:]
    for match in re.finditer(
        r"```python\n# (\S+\.py)\n(.*?)```\n\n(.*?)`python scripts/train.py (.*?)`", README, flags=re.S
    )
}


def test_the_table_of_flags_is_that_of_the_config():
    inside = README.split(BEGIN)[1].split(END)[0]
    assert inside.strip() == table().strip(), "run: python -m configs.flags_table README.md"


def test_the_table_of_trainers_has_a_cell_for_each_trainer_and_test():
    """The cells were written by the tests themselves; a test that was missing or had failed would show."""
    made = README.split(guarantees.BEGIN)[1].split(guarantees.END)[0].strip()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()]
    again = "run: python -m tests.guarantees README.md"
    assert rows[0] == ["trainer", "labels", *guarantees.COLUMNS], again
    assert [tuple(row[:2]) for row in rows[2:]] == guarantees.NAMES, again
    assert all(cell and cell != guarantees.MISSING for row in rows for cell in row), again
    tests = {name for name in vars(test_guarantees) if name.startswith("test_")}
    assert tests == {guarantees.test_name(column) for column in guarantees.COLUMNS}


def test_the_task_that_is_shown_is_the_one_that_runs():
    assert f"```python\n{(ROOT / 'trainer' / 'contrastive_trainer.py').read_text()}```" in README


def test_the_two_commands_stand_first():
    assert [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)[:2]] == [
        "pip install -e . && accelerate launch scripts/train.py",
        'pip install -e ".[dev]" && pytest',
    ]
    assert 'pip install -e ".[dev]" && pytest\n' in (ROOT / ".ci" / "run").read_text()


def run_code(code: str, cwd: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/bin", "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_lines(project: Path, sentences: str) -> None:
    """Do what the README says: `In FILE: IMPORT, and in TABLE the line LINE`."""
    sentences = " ".join(sentences.split())
    for name, file, line in re.findall(r"In `(\w+)` of `(\S+)` the line `(.*?)`", sentences):
        put(project / file, name, line)
    for file, imported, name, line in re.findall(r"In `(\S+)`: `(.*?)`, and in `(\w+)` the line `(.*?)`", sentences):
        put(project / file, name, line)
        text = (project / file).read_text()
        (project / file).write_text(text.replace("annotations\n\n", f"annotations\n\n{imported}\n", 1))


def put(file: Path, table: str, line: str) -> None:
    text = file.read_text()
    begin = re.search(rf"^{table}\b.*= \{{\n", text, flags=re.M)
    assert begin, f"no table {table} in {file}"
    file.write_text(f"{text[: begin.end()]}    {line}\n{text[begin.end() :]}")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the folders that a user changes."""
    for folder in ("configs", "data", "models", "trainer", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / "project" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "project"


@pytest.mark.parametrize("file", CHANGES)
def test_an_extension_trains_as_it_stands(file, project, tmp_path):
    code, sentences, flags = CHANGES[file]
    (project / file).write_text(code)
    add_lines(project, sentences)
    tiny = f"--epochs 3 --batch_size 16 --output_dir {tmp_path} --experiment_name x"
    done = subprocess.run(
        [sys.executable, "scripts/train.py", *shlex.split(flags), *tiny.split()], cwd=project, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(project)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in lines_of(tmp_path / "x", "epoch")]
    assert losses[-1] < 0.9 * losses[0]
    if "focal" in flags:
        assert "loss/focal" in lines_of(tmp_path / "x", "val")[-1]


def test_there_are_four_extensions():
    assert len(CHANGES) == 4


def test_the_notebook_example_and_loading_work(tmp_path):
    notebook = next(block for block in PYTHON if "MainTrainer(make_config" in block)
    assert "tensor(" in run_code(notebook, tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    load = next(block for block in PYTHON if "models.load" in block).replace("runs/NAME", str(run))
    code = "import torch\nimages_uint8 = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)\n" + load
    assert "['cat', 'dog'] 32" in run_code(code, tmp_path)


def commands() -> list[str]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
    return [
        line.split("  #")[0].strip() for line in blocks.splitlines() if "scripts/train.py" in line and "pip" not in line
    ]


@pytest.mark.parametrize(
    "command",
    [c for c in commands() if not any(word in c for word in ("cifar10", "torchrun", "--resume", "--pretrained"))],
)
def test_every_training_command_runs_at_tiny_size(command, tmp_path, image_folder):
    flags = command.split("scripts/train.py", 1)[1].replace("./dataset/YourDataset", str(image_folder))
    flags = flags.replace("path/to/bccd", "digit_scenes")
    tiny = "--max_steps 2 --batch_size 4 --image_size 16 --warmup_steps 0 --split 0.75 0.25 0".split()
    run_script("train.py", *shlex.split(flags), *tiny, "--output_dir", tmp_path)


def test_every_script_and_file_that_is_named_exists():
    for path in set(re.findall(r"(?:scripts|configs|tests|trainer|data|models)/[\w/]+\.(?:py|yaml)", README)):
        assert path in CHANGES or (ROOT / path).is_file(), path


def test_the_table_of_resuming_names_all_that_may_change():
    row = next(line for line in README.splitlines() if line.startswith("| accepted, one line each"))
    named = set(re.findall(r"`(\w+)`", row))
    assert named == MAY_CHANGE | {"stop_after_steps", "debug"}
