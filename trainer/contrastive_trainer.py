"""Images and texts in one space: what belongs together is near."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError
from data.order import Use, mix_ids
from trainer.contrastive import contrastive_loss
from trainer.losses import Criterion, combine
from trainer.main_trainer import MainTrainer
from trainer.metrics import Metrics
from trainer.retrieval import NAMES, RetrievalMetrics, names_of
from trainer.windows import Batch, as_dict, samples_in


class ContrastiveTrainer(MainTrainer):
    """Batches of images_BCHW and captions (a tuple of strings an image), a model of `models/clip.py`.

    The loss compares all samples of the global batch, so that a process computes its share of one at once.
    """

    kinds = ("captions",)
    default_model = "clip/grid_cnn"
    default_monitor = "recall_at_1"
    usage = "near = model.embed_images(images) @ model.embed_texts(model.tokens(texts)).T"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        share = max(self.batch_sizes.all()) // self.processes.number
        if self.train_loader is not None and share > self.config.micro_batch_size:
            raise ConfigError(
                f"the contrastive loss compares all {share} samples of a process, and --micro_batch_size is "
                f"{self.config.micro_batch_size}",
                fix=f"--micro_batch_size {share}, more processes, or a lower --batch_size",
            )

    def equal_on_all(self, batches: list[Batch]) -> list[int]:
        return [samples_in(batch) for batch in batches]  # the loss gathers as many rows of each process

    def get_criterion(self) -> Criterion:
        return contrastive_loss

    def on_device(self, item: Any) -> Batch:
        """With the tokens of one caption of each image, in evaluation of all: found on the CPU ahead of the step."""
        batch = as_dict(item)
        captions, ids_B = batch["captions"], batch["ids"]
        if self.model.training:
            captions = self.drawn(captions, ids_B)
        texts = [text for texts in captions for text in texts]
        each_B = torch.tensor([len(texts) for texts in captions])
        tokens_TL = self.plain_model.tokens(texts)
        more = {"names_T": names_of(tokens_TL), "image_ids_T": ids_B.repeat_interleave(each_B)}
        return super().on_device(batch | {"tokens_TL": tokens_TL} | more)

    def drawn(self, captions: list[tuple[str, ...]], ids_B: Tensor) -> list[tuple[str]]:
        """One of each image's captions, by seed, epoch and sample."""
        keys = mix_ids(self.config.seed, Use.CAPTION, self.state.epoch, ids=ids_B.numpy())
        return [(texts[key % len(texts)],) for texts, key in zip(captions, keys.tolist())]

    def forward_pass(self, batch: Batch) -> tuple[Any, Any]:
        """In evaluation there is no loss: it would depend on what else is in the batch."""
        embeddings = self.model(batch["images_BCHW"], batch["tokens_TL"])
        if not self.model.training:
            return None, embeddings
        return combine(self.criterion, embeddings, batch["names_T"], self.loss_weights), embeddings

    @torch.no_grad()
    def inference(self, inputs: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, C, H, W], uint8 or floats in 0..1."""
        self.model.eval()
        with self.averaged():
            return self.plain_model.embed_images(inputs.to(self.device))

    def as_rows(self, predictions: Tensor) -> list[dict[str, Any]]:
        return [{"embedding": [round(value, 6) for value in row]} for row in predictions.tolist()]

    def new_metrics(self) -> Metrics:
        return RetrievalMetrics(self.device)

    def val_metric_names(self) -> list[str]:
        return NAMES
