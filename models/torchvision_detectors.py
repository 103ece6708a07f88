"""torchvision's detectors by name, with random weights: for the user's classes, 1 or 3 channels, any square.

`fcos_resnet50_fpn` is torchvision's own; `fcos/resnet18` is the same detector on another backbone with a feature
pyramid. Families: fcos, retinanet, fasterrcnn. torchvision's losses are normalised over what is computed at once.
"""

from __future__ import annotations

from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection, list_models, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from models.arguments import Parameters, parameters_of
from models.base_model import BaseModel, ModelError

LEVELS = 5  # of the pyramids below
SMALL = 256  # pixels
FAMILIES = {"fcos": detection.FCOS, "retinanet": detection.RetinaNet, "fasterrcnn": detection.FasterRCNN}
DETECTORS = FAMILIES | {"ssd": detection.ssd.SSD}  # by the beginning of their names
OF_ANCHORS = ("retinanet", "fasterrcnn")  # FCOS has its anchors for scales alone
# arguments that are no values
MODULES = ("anchor_generator", "rpn_anchor_generator", "head", "rpn_head", "box_roi_pool", "box_head", "box_predictor",
           "proposal_matcher")  # fmt: skip
WITH_BACKGROUND = ("fasterrcnn", "ssd")  # whose class 0 is none of the user's
FIXED_SIZES = {"ssdlite320": 320, "ssd300": 300}
OTHER_TASKS = ("maskrcnn", "keypointrcnn")


class TorchvisionDetector(BaseModel):
    """A torchvision detector behind our normalisation; see models/detection.py for `forward`.

    anchor_sizes: pixels, for each of the five levels of the pyramid a side, or a list of sides; where None, those of
    torchvision, which are halved for pictures of less than 256 px. options: more arguments of torchvision's class,
    `score_thresh` for example; with `min_size` it enlarges the square that it is given.
    """

    loss_in_evaluation, loss_is_mean_over_samples = False, False

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        anchor_sizes: list[int] | list[list[int]] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.first_class = int(architecture.startswith(WITH_BACKGROUND))
        settings = dict(options)
        side = options.get("min_size", options.get("max_size", image_size))
        if not architecture.startswith(tuple(FIXED_SIZES)):
            settings = {"min_size": side, "max_size": side} | settings
        settings |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # BaseModel normalises
        count = num_classes + self.first_class
        family, _, backbone = architecture.partition("/")
        if anchor_sizes is not None:
            if not backbone:
                raise ModelError(f"anchor_sizes are for {', '.join(FAMILIES)} with a backbone: fcos/resnet18")
            settings |= anchors(family, anchor_sizes)
        if backbone:
            self.net = FAMILIES[family](pyramid(family, backbone), num_classes=count, **settings)
        else:
            plain = {"weights": None, "weights_backbone": None}
            self.net = detection.__dict__[architecture](num_classes=count, **plain, **settings)
        if anchor_sizes is None and architecture.startswith(OF_ANCHORS) and side < SMALL:
            halve_anchors(self.net)

        if hasattr(self.net, "roi_heads"):
            self.not_measured = "the second stage"  # which computes on what the first has found

    @property
    def dim(self) -> int:
        return self.net.backbone.out_channels if hasattr(self.net.backbone, "out_channels") else 0

    def init_weights(self) -> None:
        """torchvision has initialised all by each architecture's own rule."""

    def compile(self, *given: Any, **named: Any) -> None:
        """The backbone alone: what follows depends on what is found, and would be compiled again and again."""
        self.net.backbone.compile(*given, **named)

    def forward(self, images_BCHW: Tensor, boxes_BM4: Tensor | None = None, labels_BM: Tensor | None = None) -> Any:
        images = self.normalize(images_BCHW).expand(-1, 3, -1, -1)
        if self.training and (boxes_BM4 is None or labels_BM is None):
            levels = list(self.net.backbone(images).values())
            return None, self.net.rpn.head(levels) if hasattr(self.net, "rpn") else self.net.head(levels)
        if self.training:
            assert boxes_BM4 is not None and labels_BM is not None
            targets = [
                {"boxes": boxes[labels >= 0].to(images.dtype), "labels": labels[labels >= 0] + self.first_class}
                for boxes, labels in zip(boxes_BM4, labels_BM)
            ]
            parts = self.net(list(images), targets)
            return {"loss": sum(parts.values())} | {f"loss/{n}": part.detach() for n, part in parts.items()}, None
        found = self.net(list(images))
        return None, [image | {"labels": image["labels"] - self.first_class} for image in found]


def pyramid(family: str, name: str) -> nn.Module:
    """A backbone with a feature pyramid, for one of the families."""
    more: dict[str, Any] = {"norm_layer": nn.BatchNorm2d, "weights": None, "trainable_layers": 5}
    if family != "fasterrcnn":
        more |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    return resnet_fpn_backbone(backbone_name=name, **more)


def anchors(family: str, sizes: list[int] | list[list[int]]) -> dict[str, Any]:
    """The argument of a family that holds its anchors."""
    sides = [tuple(level) if isinstance(level, list) else (level,) for level in sizes]
    if len(sides) != LEVELS or (family == "fcos" and any(len(level) != 1 for level in sides)):
        each = "one side" if family == "fcos" else "a side or a list of sides"
        raise ModelError(f"anchor_sizes is {sizes}: {family} needs {each} for each of its {LEVELS} levels")
    ratios = (1.0,) if family == "fcos" else (0.5, 1.0, 2.0)
    made = AnchorGenerator(tuple(sides), (ratios,) * len(sides))
    return {"rpn_anchor_generator" if family == "fasterrcnn" else "anchor_generator": made}


def halve_anchors(net: nn.Module) -> None:
    """torchvision's are made for pictures of 800 px: from 32 px on, which is half of a small picture's side."""
    holder: Any = net.rpn if hasattr(net, "rpn") else net
    own = holder.anchor_generator
    holder.anchor_generator = AnchorGenerator(
        tuple(tuple(side / 2 for side in level) for level in own.sizes), own.aspect_ratios
    )


def parameters(name: str) -> Parameters:
    """What torchvision's own detector may be told."""
    family = next(detector for prefix, detector in DETECTORS.items() if name.startswith(prefix))
    found = {n: p for n, p in parameters_of(family, with_default=True).items() if n not in MODULES}
    for size in found.keys() & {"min_size", "max_size"}:  # by default --image_size
        found[size] = found[size].replace(annotation=int, default=Parameter.empty)
    return found


def torchvision_names() -> list[str]:
    own = [name for name in list_models(module=detection) if not name.startswith(OTHER_TASKS)]
    backbones = [name for name in resnet.__all__ if name.islower()]
    return own + [f"{family}/{name}" for family in FAMILIES for name in backbones]


def input_size(architecture: str, image_size: int) -> int:
    """The side that the detector takes: its own where it is fixed."""
    return next((side for name, side in FIXED_SIZES.items() if architecture.startswith(name)), image_size)
