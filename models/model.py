"""The table of models: a plain dict from name to builder, and what is looked up in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from models import torchvision_models
from models.base_model import BaseModel, ModelError
from models.clip import CLIP, PREFIX
from models.grid_cnn import GridCNN
from models.multi_head import MultiHead
from models.simple_cnn import SimpleCNN

# A model of your own: one line here. A builder takes num_classes, in_channels, image_size and, if it has one, dropout.
MODELS: dict[str, Callable[..., BaseModel]] = {
    "simple_cnn": SimpleCNN,
    "grid_cnn": GridCNN,
}


def model_names() -> list[str]:
    """Of image classifiers; each of them is the image side of the model clip/<name>, too."""
    return [*MODELS, *torchvision_models.names()]


def check_name(name: str) -> None:
    """Raises ModelError with the nearest names where there is no such model."""
    prefix = PREFIX if name.startswith(PREFIX) else ""
    if name.removeprefix(PREFIX) not in model_names():
        near = difflib.get_close_matches(name.removeprefix(PREFIX), model_names(), n=3, cutoff=0.4) or list(MODELS)
        raise ModelError(f"no model is called {name!r}: did you mean {' or '.join(prefix + one for one in near)}?")


def build(name: str, **model_args: Any) -> BaseModel:
    """A model with fresh weights from the current state of torch's generator."""
    check_name(name)
    given = {key: value for key, value in model_args.items() if key != "architecture" and value is not None}
    check_labels_fit(name, given)
    if "heads" in given:  # several tasks
        builder: Callable[..., BaseModel] = partial(MultiHead, name)
    elif name.startswith(PREFIX):
        builder = partial(CLIP, name)
    else:
        builder = MODELS.get(name, partial(torchvision_models.TorchvisionClassifier, name))
    try:
        model = builder(**given)
    except TypeError as error:
        raise ModelError(f"{name} cannot be built with {sorted(given)}: {error}") from None
    model.name = name
    if name in MODELS and not isinstance(builder, type) and "heads" not in given:
        model.model_args = given  # a function builds it: these are its arguments, not the constructor's
    return model


def check_labels_fit(name: str, given: dict[str, Any]) -> None:
    """Raises ModelError for a classifier of captions, or a clip/ model of anything else."""
    if ("tokenizer" in given) != name.startswith(PREFIX):
        other = name.removeprefix(PREFIX) if name.startswith(PREFIX) else PREFIX + name
        raise ModelError(f"--model {name} does not fit the labels of the data: take {other}")


def input_size(name: str, image_size: int) -> int:
    """The side of the images that the model will be given: image_size, or more where it cannot take so little."""
    check_name(name)
    name = name.removeprefix(PREFIX)
    return image_size if name in MODELS else torchvision_models.input_size(name, image_size)
