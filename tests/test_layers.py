"""The architecture: who may import whom, and what is short."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = {"configs", "data", "models", "trainer", "scripts", "tests"}
MAY_IMPORT = {
    "configs": set(),
    "models": set(),
    "data": {"configs"},
    "trainer": {"configs", "data.order", "data.batch_sizes"},
    "scripts": {"configs", "data", "models", "trainer", "scripts"},
}
OPTIONAL = {"wandb", "tensorboard", "timm", "datasets", "tokenizers", "torchmetrics"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_the_layers_hold(layer: str):
    for path in (ROOT / layer).glob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            top = name.split(".")[0]
            if top in OURS - {layer} and not any(
                name == allowed or name.startswith(f"{allowed}.") or allowed.startswith(f"{name}.")
                for allowed in MAY_IMPORT[layer]
            ):
                raise AssertionError(f"{path.name} of {layer} imports {name}")


def test_models_need_torch_and_the_hub_alone():
    allowed = {
        "torch",
        "torchvision",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "timm",
        "models",
    } | sys.stdlib_module_names
    for path in (ROOT / "models").glob("*.py"):
        assert {name.split(".")[0] for name in imported(ast.parse(path.read_text()))} <= allowed, path


def test_optional_packages_are_imported_where_they_are_used():
    for layer in MAY_IMPORT:
        for path in (ROOT / layer).glob("*.py"):
            top_level = ast.Module([n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)], [])
            for node in top_level.body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    assert not {name.split(".")[0] for name in imported(node)} & OPTIONAL, path


def test_no_script_bears_the_name_of_a_standard_module():
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} & sys.stdlib_module_names == set()


def test_the_loop_fits_on_a_page_and_waits_for_the_device_nowhere():
    tree = ast.parse((ROOT / "trainer" / "main_trainer.py").read_text())
    base = ast.parse((ROOT / "trainer" / "base_trainer.py").read_text())
    functions = {n.name: n for t in (tree, base) for n in ast.walk(t) if isinstance(n, ast.FunctionDef)}
    for name in ("train_epoch", "forward_pass", "optimize", "micro_batches", "after_step"):
        node = functions[name]
        assert node.end_lineno - node.lineno < 40
        calls = {n.func.attr for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
        assert not calls & {"item", "tolist", "cpu", "numpy", "print"}, name


def test_nothing_of_the_project_is_hidden_from_git():
    lines = (ROOT / ".gitignore").read_text().split()
    assert "/runs/" in lines
    assert not {"data/", "models/", "configs/", "data", "models"} & set(lines)
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
