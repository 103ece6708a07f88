"""Images and texts in one space: a small CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.base_model import BaseModel
from models.tokens import PAD, Tokens

PREFIX = "clip/"  # before the name of an image classifier


class Embeddings(NamedTuple):
    """Of unit length, so that a product of two is their cosine."""

    images_BD: Tensor
    texts_BD: Tensor
    scale: Tensor  # [1], of the cosines in the loss


class CLIP(BaseModel):
    """A classifier of models/ whose head gives an embedding in place of logits, and a text transformer.

    tokenizer: JSON, as data/captions.py learns it. width, layers: of the text transformer. image_args: more arguments
    of the classifier.
    """

    def __init__(
        self,
        architecture: str,
        tokenizer: str,
        in_channels: int = 3,
        image_size: int = 224,
        dropout: float | None = None,
        embedding: int = 128,
        width: int = 64,
        layers: int = 2,
        image_args: dict[str, Any] | None = None,
    ):
        super().__init__()
        from models.model import build  # which has this class in its table

        self.image_encoder = build(
            architecture.removeprefix(PREFIX),
            num_classes=embedding, in_channels=in_channels, image_size=image_size, dropout=dropout,
            **(image_args or {}),
        )  # fmt: skip
        self.tokens = Tokens(tokenizer)
        self.text_encoder = TextEncoder(self.tokens.size, self.tokens.length, width, layers, embedding)
        self.log_scale = nn.Parameter(torch.zeros(1))

    @property
    def dim(self) -> int:
        return self.text_encoder.head.out_features

    def init_weights(self) -> None:
        """The image encoder has initialised itself."""
        self.text_encoder.init_weights()
        nn.init.constant_(self.log_scale, math.log(1 / 0.07))

    def forward(self, images_BCHW: Tensor, tokens_BL: Tensor) -> Embeddings:  # type: ignore[override]
        """Images and texts may differ in number."""
        return Embeddings(self.embed_images(images_BCHW), self.embed_texts(tokens_BL), self.scale())

    def scale(self) -> Tensor:
        """At most 100, as in the paper."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        return of_unit_length(self.image_encoder(self.normalize(images_BCHW)))

    def embed_texts(self, tokens_BL: Tensor) -> Tensor:
        return of_unit_length(self.text_encoder(tokens_BL))

    def example_inputs(self, batch_size: int, channels: int, image_size: int) -> tuple[Any, ...]:
        (images_BCHW,) = super().example_inputs(batch_size, channels, image_size)
        return images_BCHW, images_BCHW.new_ones(batch_size, self.tokens.length, dtype=torch.int64)


class TextEncoder(nn.Module):
    """A transformer that sees the whole text, and the mean of what it makes of the tokens."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, embedding: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, embedding, bias=False)

    def init_weights(self) -> None:
        """torch has initialised the layers. Words begin as large as what those add to them: at 0.02, as in GPT-2, the
        scenes of digits were not told apart by their digits for 400 steps."""
        for weight in (self.words.weight, self.places):
            nn.init.normal_(weight, std=0.5)
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """[B, embedding]; each row of tokens has one at least that is not PAD."""
        padding_BL = tokens_BL == PAD
        features_BLD = self.words(tokens_BL) + self.places[: tokens_BL.shape[1]]
        for layer in self.layers:
            features_BLD = layer(features_BLD, src_key_padding_mask=padding_BL)
        share_BL1 = (~padding_BL).to(features_BLD.dtype)[..., None]
        mean_BD = (self.norm(features_BLD) * share_BL1).sum(1) / share_BL1.sum(1)
        return self.head(mean_BD)


def of_unit_length(features_BD: Tensor) -> Tensor:
    """In float32 at least, whatever the layers computed in."""
    features_BD = features_BD if features_BD.dtype == torch.float64 else features_BD.float()
    return functional.normalize(features_BD, dim=1)
