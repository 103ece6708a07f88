"""Trainings on plain lists, also of tasks that count something else than samples: python tests/plain_loaders.py FOLDER

By as many processes as the launcher starts, which share the same global batches. FOLDER/PROCESSES.json then holds what
each case came to.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional

from configs.arguments import make_config
from configs.errors import DataError
from data.dataset import load_data
from data.loader import eval_loader
from tests.tiny import TinyNet, tiny_trainer
from trainer.contrastive_trainer import ContrastiveTrainer
from trainer.device import make_accelerator
from trainer.main_trainer import MainTrainer


class Masked(MainTrainer):
    """The mean over some of the samples."""

    def weights(self, batch: Any) -> Tensor:
        return (batch["ids"] % 3 != 0).double()

    def count(self, batch: Any) -> Any:
        return int(self.weights(batch).sum())

    def forward_pass(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits_BC, weights_B = self.model(batch["images_BCHW"]), self.weights(batch)
        losses_B = functional.cross_entropy(logits_BC, batch["labels"], reduction="none")
        return (losses_B * weights_B).sum() / weights_B.sum().clamp(min=1e-9), logits_BC


class MaskedByTensor(Masked):
    """Without waiting for the device."""

    def count(self, batch: Any) -> Tensor:
        return (batch["ids"] % 3 != 0).sum()


class Weighed(Masked):
    def weights(self, batch: Any) -> Tensor:
        return 0.1 + (batch["ids"] % 7).double() / 3

    def count(self, batch: Any) -> float:
        return float(self.weights(batch).sum())


class Sparse(Masked):
    """There are steps that count nothing at all."""

    def weights(self, batch: Any) -> Tensor:
        return (batch["ids"] % 40 == 0).double()


class Compared(MainTrainer):
    """Samples of all processes are compared."""

    equal_on_all = ContrastiveTrainer.equal_on_all


EVEN, TAIL, SHORT = [12] * 6, [12, 12, 12, 7], [12, 12, 12, 1]  # samples that all processes together compute at once
CASES: dict[str, tuple[type[MainTrainer], list[int], list[int], dict[str, Any]]] = {
    # task, training, evaluation, options
    "masked": (Masked, EVEN, TAIL, {}),
    "masked, in parts": (Masked, EVEN, TAIL, {"batch_size": 24}),
    "masked, by a tensor": (MaskedByTensor, EVEN, TAIL, {"batch_size": 24}),
    "weighed": (Weighed, EVEN, TAIL, {"batch_size": 24}),
    "sparse": (Sparse, EVEN, TAIL, {"batch_size": 24}),
    "a tail": (MainTrainer, TAIL, TAIL, {"trace_samples": True}),
    "a part less on one process": (MainTrainer, SHORT, SHORT, {"batch_size": 24}),
    "compared": (Compared, EVEN, TAIL, {}),
    "a step less on one process": (MainTrainer, SHORT, EVEN, {}),
    "compared, fewer on one process": (Compared, TAIL, EVEN, {}),
}


def share(sizes: list[int], process: int, processes: int) -> list[dict[str, Tensor]]:
    """One process's part of batches of these sizes; of one sample the first has it."""
    total = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (total,), generator=generator)
    noise = torch.randn(total, 1, 6, 6, dtype=torch.float64, generator=generator)
    everything = {"images_BCHW": noise + labels[:, None, None, None], "labels": labels, "ids": torch.arange(total)}
    batches = []
    for place, size in enumerate(sizes):
        start = sum(sizes[:place])
        mine = torch.arange(start, start + size).tensor_split(processes)[process]
        if len(mine):
            batches.append({name: values[mine] for name, values in everything.items()})
    return batches


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    common = {"dtype": "float64", "batch_size": 12, "optimizer": "sgd", "lr": 0.1, "epochs": 8, "log_every": 3}
    accelerator = make_accelerator(make_config(dtype="float64"))
    process, processes = accelerator.process_index, accelerator.num_processes
    found: dict[str, Any] = {}
    for name, (task, training, evaluation, options) in CASES.items():
        here = folder / f"{processes}"
        loaders = [share(sizes, process, processes) for sizes in (training, evaluation)]
        run = common | {"experiment_name": "".join(filter(str.isalpha, name))} | options
        trainer = tiny_trainer(here, *loaders, trainer=task, model=TinyNet().double(), **run)
        try:
            trainer.train()
            weights = torch.cat([p.detach().flatten() for p in trainer.plain_model.parameters()]).tolist()
            found[name] = {"weights": weights, **trainer.validate_epoch(loaders[1])}
        except DataError as error:
            found[name] = {"error": error.what}
    digits = load_data(make_config()).val
    assert digits is not None
    few = replace(digits, ids=digits.ids[:25])  # the last one is of one process alone
    loader = eval_loader(make_config(micro_batch_size=4), few, 8, process, processes)
    net = TinyNet(num_classes=10).double()
    trainer = tiny_trainer(folder / f"{processes}", None, loader, trainer=Weighed, model=net, dtype="float64")
    found["evaluated"] = trainer.validate_epoch(loader)
    if accelerator.is_main_process:
        (folder / f"{processes}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
