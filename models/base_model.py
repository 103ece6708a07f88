"""BaseModel: a module that knows how to begin, what pixels it expects, and how to be saved and loaded."""

from __future__ import annotations

import inspect
import json
import os
from abc import ABCMeta, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from models.blocks import blocks, depths


class ModelError(ValueError):
    """A model that cannot be built or loaded as asked; the message says what to do."""


class BuildThenInit(ABCMeta):
    """After the outermost `__init__`: note its arguments for config.json, then call `init_weights()`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)  # type: ignore[misc]
        bound.apply_defaults()
        model.model_args = dict(list(bound.arguments.items())[1:])
        for parameter in inspect.signature(cls.__init__).parameters.values():  # type: ignore[misc]
            if parameter.kind is parameter.VAR_KEYWORD:  # `**options`: each by its own name
                model.model_args |= model.model_args.pop(parameter.name)
        model.init_weights()
        return model


class BaseModel(nn.Module, PyTorchModelHubMixin, metaclass=BuildThenInit):
    """Write `forward`, `dim` and `init_weights`; begin `forward` with `self.normalize(images_BCHW)`.

    model_args: the arguments of the constructor; they must be JSON. name: the table's name in models/model.py.
    """

    # Of models that compute their own loss (detectors): whether it is told in evaluation; whether it is a mean over
    # samples, which no cut into micro-batches changes.
    loss_in_evaluation = True
    loss_is_mean_over_samples = True
    not_measured = ""  # what of the model `models/summary.py` does not see

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.model_args: dict[str, Any] = {}
        self.task = "classification"
        self.classes: list[str] = []
        self.labels: dict[str, Any] = {}
        self.image_size: int | None = None
        self.origin: list[str] = []  # lines that tell what of the weights is pretrained
        self.frozen: list[str] = []  # names of the body's parameters, while it rests
        self.horizontal_flip = False
        self.register_buffer("mean_C11", torch.zeros(1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.ones(1, 1, 1), persistent=False)

    @property
    def _no_split_modules(self) -> list[str]:
        """What Accelerate asks of a model: the classes of blocks that FSDP gathers as a whole."""
        return sorted({type(block).__name__ for block in blocks(self) if type(block) is not nn.Sequential})

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Any: ...

    @property
    @abstractmethod
    def dim(self) -> int:
        """Size of the features before the head."""

    @abstractmethod
    def init_weights(self) -> None:
        """Called by itself once the model is built, before any pretrained weights are loaded."""

    def head_layers(self) -> list[nn.Module]:
        """The layers that make outputs of features; the rest is the body. Override it where they are not the last
        linear layer or convolution."""
        layers: list[nn.Module] = [m for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        return layers[-1:]

    def depths(self) -> dict[nn.Parameter, int]:
        """How many blocks each parameter lies below the head."""
        return depths(self, self.head_layers())

    def freeze_body(self) -> None:
        """Let the head learn alone: the body gets no gradient, and its norms keep their running statistics."""
        of_head = {parameter for layer in self.head_layers() for parameter in layer.parameters()}
        learning = {name: p for name, p in self.named_parameters() if p.requires_grad and p not in of_head}
        for parameter in learning.values():
            parameter.requires_grad_(False)
        self.frozen = list(learning)
        self.train(self.training)

    def thaw_body(self) -> None:
        for name in self.frozen:
            self.get_parameter(name).requires_grad_(True)
        self.frozen = []
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module, except that the norms of a frozen body compute as in an evaluation."""
        super().train(mode)
        for norm in self.resting_norms():
            norm.eval()
        return self

    def resting_norms(self) -> list[_NormBase]:
        """Norms with running statistics that belong to a frozen body."""
        of_head = {module for layer in self.head_layers() for module in layer.modules()} if self.frozen else set()
        norms = [module for module in self.modules() if isinstance(module, _NormBase)] if self.frozen else []
        return [norm for norm in norms if norm not in of_head]

    def remove_head(self) -> int:
        """Take away the last linear layer or convolution, so that `forward` gives features [B, dim]; the dim. Override
        it where that is not the head."""
        dim = self.dim
        layers = [name for name, module in self.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        self.set_submodule(layers[-1], nn.Identity())
        return dim

    def example_inputs(self, batch_size: int, channels: int, image_size: int) -> tuple[Any, ...]:
        """Arguments of `forward` in training, on the device of the weights, to measure what it costs."""
        return (torch.zeros(batch_size, channels, image_size, image_size, device=next(self.parameters()).device),)

    def describe(
        self,
        *,
        task: str,
        classes: list[str],
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        horizontal_flip: bool = False,
        labels: dict[str, Any] | None = None,
    ) -> None:
        """Tell the model what it is trained on; it is saved with it. mean and std are for pixels of 0..1.
        horizontal_flip: a mirror image shows the same. labels: what the outputs stand for, JSON; where there are none,
        one class an image."""
        self.horizontal_flip, self.labels = horizontal_flip, labels or {}
        self.task, self.classes, self.image_size = task, list(classes), image_size
        for buffer, values in ((self.mean_C11, mean), (self.std_C11, std)):
            buffer.resize_(len(values), 1, 1).copy_(torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1))

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels, or floats in 0..1, to zero mean and unit variance, on the device they are on."""
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.to(self.mean_C11.dtype) / 255
        return (images_BCHW - self.mean_C11) / self.std_C11

    def config(self) -> dict[str, Any]:
        """What config.json holds: all that is needed to build the model again and feed it."""
        mean, std = (buffer.flatten().tolist() for buffer in (self.mean_C11, self.std_C11))
        return {
            "model": self.name,
            "model_args": self.model_args,
            "task": self.task,
            "classes": self.classes,
            "preprocess": {
                "image_size": self.image_size,
                "channels": len(mean),
                "mean": mean,
                "std": std,
                "horizontal_flip": self.horizontal_flip,
            },
        } | ({"labels": self.labels} if self.labels else {})

    def load_weights(self, file: str | Path, *, strict: bool = True) -> None:
        """Load a safetensors file. Raises ModelError that lists the keys or shapes that do not fit."""
        try:
            missing, unexpected = load_model(self, str(file), strict=False)
        except (RuntimeError, SafetensorError, OSError) as error:
            raise ModelError(f"{file} does not fit {self.name}: {' '.join(str(error).split())[:600]}") from None
        if strict and (missing or unexpected):
            raise ModelError(
                f"{file} does not fit {self.name}: {len(missing)} missing keys {sorted(missing)[:3]}, "
                f"{len(unexpected)} unexpected keys {sorted(unexpected)[:3]}"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)

    def write(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """config.json, then model.safetensors; each appears whole, the weights last. weights: where they are not
        the model's own."""
        form = {"format": "pt"}
        replace_file(folder / "config.json", lambda file: file.write_text(json.dumps(self.config(), indent=2)))
        replace_file(
            folder / "model.safetensors",
            lambda file: save_file(weights, file, form) if weights is not None else save_model(self, str(file), form),
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any) -> Self:
        """Built from config.json, loaded strictly, in evaluation mode."""
        if config is None:
            raise ModelError(f"no config.json at {model_id}: not a model saved by this project")
        weights = Path(model_id, "model.safetensors")
        if not Path(model_id).is_dir():
            where = {
                key: options[key] for key in ("revision", "cache_dir", "force_download", "local_files_only", "token")
            }
            weights = Path(hf_hub_download(model_id, "model.safetensors", **where))
        return cls.from_config(config, weights)

    @classmethod
    def from_config(cls, config: dict[str, Any], weights: Path) -> Self:
        """Rebuild a model from its config.json and a safetensors file. `BaseModel` itself looks its name up."""
        if inspect.isabstract(cls):
            from models.model import build

            model = build(config["model"], **config["model_args"])
        else:
            model = cls(**config["model_args"])
            model.name = config["model"]
        preprocess = config["preprocess"]
        model.describe(
            task=config["task"],
            classes=config["classes"],
            image_size=preprocess["image_size"],
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            horizontal_flip=preprocess.get("horizontal_flip", False),  # models of before were not told
            labels=config.get("labels"),
        )
        model.load_weights(weights)
        return model.eval()  # type: ignore[return-value]


def replace_file(path: Path, write: Any) -> None:
    """Write a file beside its place, then rename: a reader sees the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # or a power cut may leave the new name with no content
    os.replace(partial, path)
