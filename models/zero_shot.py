"""A classifier made of words (Radford et al. 2021, section 3.1): nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.base_model import BaseModel
from models.clip import CLIP


class ZeroShot(BaseModel):
    """An image is of the class whose texts are nearest.

    words: what the classes are called; prompts: texts with {} for a word, whose embeddings are averaged.
    """

    def __init__(self, clip: CLIP, classes: list[str], words: list[str], prompts: list[str]):
        super().__init__()
        self.clip = clip
        self.name = f"{clip.name} by {len(prompts)} prompts"
        self.describe(
            task="classification",
            classes=classes,
            image_size=clip.image_size or 224,
            mean=tuple(clip.mean_C11.flatten().tolist()),
            std=tuple(clip.std_C11.flatten().tolist()),
        )
        tokens_TL = clip.tokens([prompt.replace("{}", word) for word in words for prompt in prompts])
        with torch.no_grad():
            texts_CPD = clip.embed_texts(tokens_TL.to(clip.log_scale.device)).unflatten(0, (len(words), len(prompts)))
            self.register_buffer("texts_CD", functional.normalize(texts_CPD.mean(1), dim=1), persistent=False)

    @property
    def dim(self) -> int:
        return self.clip.dim

    def init_weights(self) -> None:
        """Nothing is drawn."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.clip.scale() * self.clip.embed_images(images_BCHW) @ self.get_buffer("texts_CD").T
