"""Begin from weights that were trained for something else: what fits is taken, and all that is not is told."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from models import timm_models, torchvision_models
from models.base_model import BaseModel, ModelError
from models.load import find_weights, load_from_hub, named_as, read_weights
from models.torchvision_models import IMAGENET, Pixels

LISTED = 6
State = dict[str, Tensor]


def begin_from(model: BaseModel, source: str) -> None:
    """Take what fits of pretrained weights, and the pixels that they are for; `model.origin` then tells of both.

    source: whatever `models.load` takes, a .pth file, `torchvision` or `timm`. Tensors of other names or shapes are
    left out, and a head of other classes. Raises ModelError where nothing of the body fits.
    """
    state, pixels, classes = find(model, source)
    own, notes = model.state_dict(), []
    state = named_as(own, state)
    notes += fit_first_convolution(model, state)
    notes += fit_positions(own, state)
    head = names_of_head(model)
    new_classes = classes is not None and classes != model.classes
    taken = {
        name: tensor
        for name, tensor in state.items()
        if name in own and tensor.shape == own[name].shape and not (new_classes and name in head)
    }
    if not {name for name, _ in model.named_parameters()} & taken.keys() - head:
        raise ModelError(
            f"nothing of the body of {model.name} is in {source}: it has {listed(own)}; there is {listed(state)}"
        )
    model.load_state_dict(taken, strict=False)
    if pixels:
        notes.append(expect(model, *pixels))
    model.origin = [
        f"pretrained {len(taken)} of {len(own)} tensors, from {source}",
        f"new: {listed({name: tensor for name, tensor in own.items() if name not in taken})}",
        f"not used: {listed({name: tensor for name, tensor in state.items() if name not in taken})}",
        *notes,
    ]


def find(model: BaseModel, source: str) -> tuple[State, Pixels | None, list[str] | None]:
    """The tensors of a source, and what is known of the pixels and classes that they are for."""
    if source == "torchvision":
        return *torchvision_models.pretrained(model.name), None
    if source == "timm":
        return *timm_models.pretrained(model.name), None
    path = Path(source)
    if not path.exists() and path.suffix not in (".pth", ".pt"):
        found = load_from_hub(source)
        return found.state_dict(), pixels_of(found.config()), found.classes
    state, config = read_weights(source), find_weights(path).with_name("config.json")
    if not config.is_file():  # files of those libraries are mostly of ImageNet
        theirs = isinstance(model, (torchvision_models.TorchvisionClassifier, timm_models.TimmClassifier))
        return state, IMAGENET if theirs else None, None
    try:
        described = json.loads(config.read_text())
        return state, pixels_of(described), described.get("classes")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from None


def pixels_of(described: dict) -> Pixels | None:
    """From this project's config.json, or timm's."""
    known = described.get("preprocess") or described.get("pretrained_cfg") or {}
    return (tuple(known["mean"]), tuple(known["std"])) if {"mean", "std"} <= known.keys() else None


def names_of_head(model: BaseModel) -> set[str]:
    of_head = {id(tensor) for layer in model.head_layers() for tensor in layer.state_dict(keep_vars=True).values()}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in of_head}


def fit_first_convolution(model: BaseModel, state: State) -> list[str]:
    """Between colour and grey: a grey pixel gives what three equal colours gave, and the other way round."""
    name, own = next(((f"{n}.weight", m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if own is None or name not in state or state[name].ndim != 4:
        return []
    channels, there = own.weight.shape[1], state[name].shape[1]
    if (there, channels) == (3, 1):
        state[name] = state[name].sum(1, keepdim=True)
        return [f"{name} summed over its 3 colours, for grey images"]
    if (there, channels) == (1, 3):
        state[name] = (state[name] / 3).repeat(1, 3, 1, 1)
        return [f"{name} shared out over 3 colours, a third each"]
    return []


def fit_positions(own: State, state: State) -> list[str]:
    """Position embeddings [1, N, D] of a square of patches, interpolated (Dosovitskiy et al. 2021, section 3.2)."""
    notes = []
    for name in [name for name in own.keys() & state.keys() if "pos_embed" in name]:
        wanted, there = own[name].shape, state[name].shape
        side, side_there = (int((length - 1) ** 0.5) for length in (wanted[1], there[1]))
        if wanted == there or len(there) != 3 or there[2] != wanted[2]:
            continue
        if (side**2 + 1, side_there**2 + 1) != (wanted[1], there[1]):  # a class token and a square
            continue
        token, patches = state[name][:, :1], state[name][:, 1:]
        grid_1DHW = patches.transpose(1, 2).reshape(1, -1, side_there, side_there)
        grid_1DHW = nn.functional.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
        state[name] = torch.cat([token, grid_1DHW.flatten(2).transpose(1, 2)], 1)
        notes.append(f"{name} interpolated from {side_there}x{side_there} to {side}x{side} patches")
    return notes


def expect(model: BaseModel, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Let the model normalise its pixels as the weights expect it; a line that says so."""
    channels = len(model.mean_C11)
    if channels != len(mean):  # grey from colour, or colour from grey
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    model.describe(task=model.task, classes=model.classes, image_size=model.image_size or 0, mean=mean, std=std)
    numbers = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return "pixels normalised as those weights expect: mean {}, std {}".format(*numbers)


def listed(tensors: State) -> str:
    """The first names with their shapes."""
    shown = [f"{name} {tuple(tensor.shape)}" for name, tensor in [*tensors.items()][:LISTED]]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") if shown else "nothing"
