"""Models of all tasks, as they were drawn, measured on few samples: python tests/evaluations.py FILE FOLDER_OF_TARS

By as many processes as the launcher starts; FILE then holds a dict of metrics for each task, source and size.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from configs.arguments import make_config
from data import digit_captions, digit_scenes
from data.dataset import load_data
from data.loader import eval_loader
from models import BaseModel
from models.detection import DETECTORS
from scripts.wiring import TRAINERS, build_model, completed
from trainer.device import make_accelerator

SIZES = (1, 2, 3, 5, 35)  # samples, of which a process computes 4 at once
TARS = (3, 35)
TASKS = {
    "classification": "digits",
    "multitask": "digit_ink",
    "image_text": "digit_captions",
    "detection": "digit_scenes",
}


class Shaken(BaseModel):
    """Finds the boxes that there are, more or less, as the pixels of an image decide alone."""

    def __init__(self, num_classes: int, in_channels: int = 1, image_size: int = 64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    @property
    def dim(self) -> int:
        return 1

    def init_weights(self) -> None:
        pass

    def forward(self, images_BCHW: Tensor, boxes_BM4: Tensor, labels_BM: Tensor) -> Any:
        found = []
        for image, boxes, labels in zip(images_BCHW, boxes_BM4, labels_BM):
            generator = torch.Generator().manual_seed(int(image.sum()))
            boxes, labels = boxes[labels >= 0], labels[labels >= 0]
            scores = torch.rand(len(labels), generator=generator).sort(descending=True).values
            found.append({"boxes": boxes + 2 * torch.randn(boxes.shape, generator=generator), "scores": scores,
                          "labels": (labels + (scores < 0.3).long()) % 10})  # fmt: skip
        return {"loss": self.weight * self.normalize(images_BCHW).mean()}, found


def main(file: str, tars: str) -> None:
    torch.set_num_threads(1)
    digit_scenes.SCENES |= {"train": 4, "val": 35, "test": 1}
    digit_captions.SCENES |= {"train": 40, "val": 35, "test": 1}
    DETECTORS["shaken"] = Shaken
    plain: dict[str, Any] = {"dtype": "float64", "micro_batch_size": 4, "num_workers": 0, "split": (0.5, 0.5, 0.0)}
    accelerator = make_accelerator(make_config(**plain))
    process, processes = accelerator.process_index, accelerator.num_processes
    found = {}

    def measured(name: str, config: Any, sizes: tuple[int, ...], part: str = "val") -> None:
        data = load_data(config)
        config = completed(config, data.kind)
        trainer = TRAINERS[config.task](config, build_model(config, data), accelerator=accelerator)
        split = getattr(data, part)
        for size in sizes:
            few = replace(split, ids=split.ids[:size]) if split.counted else split
            loader = eval_loader(config, few, data.image_size, process, processes)
            found[f"{name}, {size}"] = trainer.validate_epoch(loader)

    for task, dataset in TASKS.items():
        model = "shaken" if task == "detection" else None
        for streaming in (False, True):
            config = make_config(dataset=dataset, model=model, streaming=streaming, **plain)
            measured(f"{task}, {'streamed' if streaming else 'at hand'}", config, SIZES)
    for size in TARS:
        stream = {"data_files": (f"{tars}/{size}.tar",), "streaming": True, "max_steps": 1, "num_classes": 10}
        config = make_config(**(plain | stream | {"split": (1.0, 0.0, 0.0)}))
        measured("a stream of unknown length", config, (size,), "train")
    if accelerator.is_main_process:
        Path(file).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
