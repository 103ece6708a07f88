"""`timm/NAME`: every classifier of the package timm, behind our normalisation."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any

from torch import Tensor, nn

from models.arguments import Parameters, parameters_of_module
from models.base_model import BaseModel, ModelError
from models.torchvision_models import Pixels

PREFIX = "timm/"


class TimmClassifier(BaseModel):
    """A timm architecture with random weights. architecture: timm's name of it, without `timm/`. options: more of
    timm's own arguments, drop_path_rate for example."""

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
        if dropout is not None:
            options["drop_rate"] = dropout
        if known(architecture).fixed_input_size:
            options["img_size"] = image_size
        self.net = timm().create_model(architecture, num_classes=num_classes, in_chans=in_channels, **options)

    def head_layers(self) -> list[nn.Module]:
        head = self.net.get_classifier()
        return [head] if isinstance(head, nn.Module) else list(head)  # two with a distilled one

    @property
    def dim(self) -> int:
        return self.net.head_hidden_size

    def init_weights(self) -> None:
        """timm has initialised it by each architecture's own rule."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.net(self.normalize(images_BCHW))


def timm() -> Any:
    """The package. Raises ModelError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"models of timm need its package ({error}): pip install -e '.[timm]', or timm") from None
    return timm


def known(architecture: str) -> Any:
    """What timm knows of an architecture's weights: input_size, fixed_input_size, mean, std, ..."""
    return timm().get_pretrained_cfg(architecture)


def parameters(name: str) -> Parameters:
    """What timm's own architecture may be told."""
    entry = timm().model_entrypoint(name.removeprefix(PREFIX))
    return parameters_of_module(sys.modules[entry.__module__])


def check_name(name: str) -> None:
    """Raises ModelError with the nearest names where timm has no such model."""
    architecture, names = name.removeprefix(PREFIX), timm().list_models()
    if not timm().is_model(architecture):
        near = difflib.get_close_matches(architecture, names, n=3, cutoff=0.4) or names[:3]
        raise ModelError(f"timm has no model {architecture!r}: did you mean {' or '.join(PREFIX + n for n in near)}?")


def input_size(name: str, image_size: int) -> int:
    """The smallest side from image_size up that the architecture can take."""
    architecture = name.removeprefix(PREFIX)
    config = known(architecture)
    if not config.fixed_input_size:
        return max(image_size, 32)  # most halve their input five times
    patch = re.search(r"patch(\d+)_\d+", architecture)
    if patch is None or "window" in architecture:
        return config.input_size[-1]
    return max(2, -(-image_size // int(patch[1]))) * int(patch[1])


def pretrained(name: str) -> tuple[dict[str, Tensor], Pixels]:
    """timm's own weights of an architecture, from the hub or its cache, and the pixels that they are for."""
    if not name.startswith(PREFIX):
        raise ModelError(f"--pretrained timm is for --model timm/NAME, and this is {name}")
    architecture = name.removeprefix(PREFIX)
    try:
        model = timm().create_model(architecture, pretrained=True)
    except (OSError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"timm's weights of {architecture} cannot be fetched: {first_line}") from None
    config = model.pretrained_cfg
    return model.state_dict(), (tuple(config["mean"]), tuple(config["std"]))
