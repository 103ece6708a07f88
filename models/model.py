"""The table of models: a plain dict from name to builder, and what is looked up in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from models import detection, timm_models, torchvision_detectors, torchvision_models
from models.arguments import GIVEN, Parameters, check_arguments, parameters_of, takes_more
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


def model_names(task: str | None = None) -> list[str]:
    """Of a task; else of all classifiers and detectors. Each classifier is the image side of clip/<name>, too."""
    classifiers = [*MODELS, *torchvision_models.names()]
    if task == "detection":
        return detection.names()
    if task == "image_text":
        return [PREFIX + name for name in classifiers]
    return classifiers if task else [*classifiers, *detection.names()]


def check_name(name: str, task: str | None = None) -> None:
    """Raises ModelError with the nearest names where there is no such model, or none of the task."""
    if name.startswith(timm_models.PREFIX) and task != "detection":
        timm_models.check_name(name)
        return
    names = model_names(task or ("image_text" if name.startswith(PREFIX) else None))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:1]
        others = {"boxes": "detection", "captions": "image_text", "images alone": None}
        elsewhere = next((labels for labels, other in others.items() if task and name in model_names(other)), None)
        what = f"{name!r} is a model for {elsewhere}" if elsewhere else f"no model is called {name!r}"
        raise ModelError(f"{what}: did you mean {' or '.join(near)}{f', for {task}' if task else ''}?")


def build(name: str, **model_args: Any) -> BaseModel:
    """A model with fresh weights from the current state of torch's generator."""
    check_name(name)
    given = {
        key: value
        for key, value in model_args.items()
        if key != "architecture" and not (value is None and key in GIVEN)  # None: the model's own default
    }
    builder = partial(MultiHead, name) if "heads" in given else builder_of(name)
    try:
        model = builder(**given)
    except TypeError as error:
        raise ModelError(f"{name} cannot be built with {sorted(given)}: {error}") from None
    model.name = name
    if name in MODELS and not isinstance(builder, type) and "heads" not in given:
        model.model_args = given  # a function builds it: these are its arguments, not the constructor's
    return model


def builder_of(name: str) -> Callable[..., BaseModel]:
    if name in detection.names():
        return detection.builder(name)
    if name.startswith(PREFIX):
        return partial(CLIP, name)
    if name in MODELS:
        return MODELS[name]
    if name.startswith(timm_models.PREFIX):
        return partial(timm_models.TimmClassifier, name.removeprefix(timm_models.PREFIX))
    return partial(torchvision_models.TorchvisionClassifier, name)


def takes(name: str) -> Parameters:
    """The arguments of a model that `build` takes beside those that data and other flags give."""
    own = parameters_of(builder_of(name))
    if name in MODELS or name in detection.DETECTORS or name.startswith(PREFIX):
        return own
    if name.startswith(timm_models.PREFIX):
        return own | timm_models.parameters(name)
    family = torchvision_detectors if name in detection.names() else torchvision_models
    return own | family.parameters(name)


def check_model_args(name: str, model_args: Mapping[str, Any]) -> None:
    """Raises ModelError where --model_args, or image_args of a CLIP, has what the model cannot be built with."""
    if name in MODELS and takes_more(MODELS[name]):
        return  # `**options` of your own
    check_arguments(name, takes(name), model_args)
    if name.startswith(PREFIX):
        check_model_args(name.removeprefix(PREFIX), model_args.get("image_args") or {})


def input_size(name: str, image_size: int) -> int:
    """The side of the images that the model will be given: image_size, or more where it cannot take so little."""
    check_name(name)
    name = name.removeprefix(PREFIX)
    if name in MODELS or name in detection.DETECTORS:
        return image_size
    if name.startswith(timm_models.PREFIX):
        return timm_models.input_size(name, image_size)
    family = torchvision_detectors if name in detection.names() else torchvision_models
    return family.input_size(name, image_size)
