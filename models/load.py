"""Find the weights of a model, wherever they are, and load it with nothing but its config.json."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.base_model import BaseModel, ModelError


def load(path_or_id: str) -> BaseModel:
    """A model in evaluation mode, from a run, a checkpoint, a `best/` folder, a safetensors file or a hub id."""
    path = Path(path_or_id)
    if not path.exists():
        return load_from_hub(path_or_id)
    weights = find_weights(path)
    config = weights.with_name("config.json")
    if not config.is_file():
        raise ModelError(f"no config.json beside {weights}: it names the model, its classes and its pixels")
    return BaseModel.from_config(read_config(config), weights)


def load_from_hub(repository: str) -> BaseModel:
    looks_like_a_path = (
        repository.count("/") != 1 or repository.startswith((".", "/")) or repository.endswith(".safetensors")
    )
    if looks_like_a_path:
        raise ModelError(f"{repository} does not exist: give a run, a checkpoint, a best/ folder, a file or a hub id")
    try:
        return BaseModel.from_pretrained(repository)
    except ModelError:
        raise
    except Exception as error:  # of the hub client: offline, no such repository, no right
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{repository} is no local path, and the hub did not give it: {first_line}") from None


def find_weights(path: Path) -> Path:
    """The safetensors file of a path; the averaged weights of a checkpoint where it has them."""
    if path.is_file():
        return path
    for candidate in (
        path / "best" / "model.safetensors",  # a run
        path / "ema.safetensors",  # a checkpoint with averaged weights
        path / "model.safetensors",  # a checkpoint or a best/ folder
    ):
        if candidate.is_file():
            return candidate
    raise ModelError(f"no model.safetensors in {path}: give a run, a checkpoint or a best/ folder")


def load_weights_into(model: BaseModel, path_or_id: str) -> None:
    """Begin from pretrained weights of the same architecture; torchvision's own .pth files fit as well."""
    own = model.state_dict()
    state = named_as(own, read_weights(path_or_id))
    misfits = [
        f"{key}: {tuple(state[key].shape) if key in state else 'missing'} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key not in state or state[key].shape != value.shape
    ] + [f"{key}: unexpected" for key in state if key not in own]
    if misfits:
        raise ModelError(
            f"{path_or_id} does not fit {model.name}, {len(misfits)} tensors differ: {'; '.join(misfits[:3])}"
        )
    model.load_state_dict(state)


def read_weights(path_or_id: str) -> dict[str, Tensor]:
    """The tensors of a run, a checkpoint, a `best/` folder, a .safetensors or .pth file or a hub id."""
    path = Path(path_or_id)
    if path.suffix in (".pth", ".pt"):
        if not path.is_file():
            raise ModelError(f"{path} does not exist")
        return read_pickled(path)
    if path.exists():
        file = find_weights(path)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from None
    return load_from_hub(path_or_id).state_dict()


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors that torch.save wrote, alone or beside others under a usual name; nothing in the file is executed."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ModelError(f"{path} holds no weights that can be loaded: {str(error).splitlines()[0]}") from None
    for name in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path} holds no state dict: torch.save(model.state_dict(), ...) writes one")
    return found


def named_as(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the model's names: those of torchvision and timm lack the prefix of our wrapper."""
    prefixed = {f"net.{key}": value for key, value in state.items()}
    return prefixed if own.keys() & prefixed.keys() and not own.keys() & state.keys() else dict(state)


def read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        missing = [key for key in ("model", "model_args", "task", "classes", "preprocess") if key not in config]
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is no model's config: {error}") from None
    if missing:
        raise ModelError(f"{file} is no model's config: it lacks {', '.join(missing)}")
    return config
