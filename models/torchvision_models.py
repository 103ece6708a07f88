"""Every torchvision classifier by its name, for any number of classes, 1 or 3 channels and small images."""

from __future__ import annotations

import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from models.arguments import Parameters, parameters_of_module
from models.base_model import BaseModel, ModelError

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, of 0..1
IMAGENET: Pixels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = 64  # pixels; below, a ResNet's first layers would leave next to nothing of the image


class TorchvisionClassifier(BaseModel):
    """A torchvision architecture with random weights, behind our normalisation. options: more of torchvision's own
    arguments, stochastic_depth_prob for example."""

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        dropout: float | None = None,
        **options: Any,
    ):
        super().__init__()
        self.net = torchvision_models.get_model(
            architecture, num_classes=num_classes, **builder_options(architecture, image_size, dropout), **options
        )
        self.new_layers: list[str] = []
        if isinstance(self.net, torchvision_models.ResNet) and image_size < SMALL:
            # He et al. 2016, section 4.2: 3x3 with stride 1 and no pooling for small images
            self._replace("conv1", kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
            self.net.maxpool = nn.Identity()
        if in_channels != 3:
            first = next(name for name, module in self.net.named_modules() if isinstance(module, nn.Conv2d))
            self._replace(first, in_channels=in_channels)

    def _replace(self, name: str, **changes: Any) -> None:
        """Put a convolution with other settings in the place of an old one."""
        old = self.net.get_submodule(name)
        assert isinstance(old, nn.Conv2d)
        kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options = {key: getattr(old, key) for key in kept} | {"bias": old.bias is not None}
        self.net.set_submodule(name, nn.Conv2d(**(options | changes)))
        self.new_layers.append(name)

    @property
    def dim(self) -> int:
        (head,) = self.head_layers()
        assert isinstance(head, (nn.Linear, nn.Conv2d))
        return head.in_features if isinstance(head, nn.Linear) else head.in_channels

    def init_weights(self) -> None:
        """torchvision has initialised the rest by each architecture's own rule."""
        for name in self.new_layers:
            conv = self.net.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.net(self.normalize(images_BCHW))


def names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


def pretrained(architecture: str) -> tuple[dict[str, Tensor], Pixels]:
    """torchvision's own weights of an architecture, from its cache or the network, and the pixels that they are for."""
    if architecture not in names():
        raise ModelError(f"--pretrained torchvision is for its own models, and {architecture} is none")
    weights = torchvision_models.get_model_weights(architecture).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, a wrong hash, half a file
        raise ModelError(
            f"torchvision's weights of {architecture} cannot be fetched ({error}): put {Path(weights.url).name} into "
            f"{torch.hub.get_dir()}/checkpoints, from {weights.url}"
        ) from None
    pixels = weights.transforms()
    mean, std = tuple(pixels.mean), tuple(pixels.std)
    if architecture in ("googlenet", "inception_v3"):  # which torchvision lets scale their input once more
        mean = std = (0.5, 0.5, 0.5)
    return state, (mean, std)


def builder_options(architecture: str, image_size: int, dropout: float | None) -> dict[str, Any]:
    """The arguments that this architecture takes besides the number of classes."""
    options: dict[str, Any] = {}
    if architecture.startswith("vit_"):
        options["image_size"] = image_size
    if architecture.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    if architecture in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if dropout is not None:
        if not takes_dropout(architecture):
            raise ModelError(f"{architecture} has no dropout to set: leave --dropout out, or choose another --model")
        options["dropout"] = dropout
    return options


def parameters(architecture: str) -> Parameters:
    """What torchvision's own architecture may be told."""
    return parameters_of_module(sys.modules[torchvision_models.get_model_builder(architecture).__module__])


def takes_dropout(architecture: str) -> bool:
    if architecture.startswith(("convnext", "maxvit")):
        return False
    builder = torchvision_models.get_model_builder(architecture)
    family = getattr(inspect.getmodule(builder), "__dict__", {}).values()
    return any(
        inspect.isclass(item)
        and issubclass(item, nn.Module)
        and item.__module__ == builder.__module__
        and {"num_classes", "dropout"} <= set(inspect.signature(item.__init__).parameters)
        for item in family
    )


def input_size(architecture: str, image_size: int) -> int:
    """The smallest side from image_size up that the architecture can take."""
    weights = torchvision_models.get_model_weights(architecture)
    smallest = min(min(entry.meta["min_size"]) for entry in weights)
    if architecture.startswith("vit_"):
        patch = int(architecture.rsplit("_", 1)[1])
        return max(2, -(-image_size // patch)) * patch
    if architecture.startswith("maxvit"):
        return -(-image_size // smallest) * smallest
    if architecture.startswith("swin"):
        smallest = 32  # its windows pad: the size it was trained at is no lower bound
    return max(image_size, smallest)
