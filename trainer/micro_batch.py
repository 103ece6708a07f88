"""--auto_micro_batch: the largest micro-batch that the GPUs' memory allows, found once."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from configs.options import Config
from configs.yaml_file import read_yaml
from data.batch_sizes import BatchSizes, check_shares
from data.order import even_parts
from trainer import run_folder
from trainer.device import set_algorithms
from trainer.optim import build_optimizers

TOO_MUCH = ("ALLOC_FAILED", "out of memory", "32-bit", "unable to find an engine")
SPARE = 0.1  # of the GPU's memory, for what a run adds: NCCL's buffers, fragments, an evaluation


def found_or_recorded(config: Config, model: nn.Module, images: tuple[int, int, int], accelerator: Accelerator) -> int:
    """The size that the run was begun with, or else the largest that fits, the same on all processes.

    images: channels, height and width of one.
    """
    (known,) = broadcast_object_list([recorded(config)])
    if known:
        return known
    check_memory_can_be_tried(accelerator)
    check_shares(BatchSizes.of(config), accelerator.num_processes)
    set_algorithms(config)
    share = largest_share(config, accelerator)
    found = min(gather_object([largest(share, lambda size: fits(config, model, images, size, accelerator))]))
    if not found:
        raise ConfigError("not even the smallest micro-batch fits into the GPU's memory", fix="a smaller --image_size")
    return found


def largest_share(config: Config, accelerator: Accelerator) -> int:
    """Samples of one process in an optimizer step."""
    return max(BatchSizes.of(config).all()) // accelerator.num_processes


def recorded(config: Config) -> int | None:
    file = run_folder.find(config) / "config.yaml"
    return int(read_yaml(file)["micro_batch_size"]) if file.is_file() else None


def check_memory_can_be_tried(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda" and not accelerator.is_fsdp2:
        return
    what = "with FSDP" if accelerator.is_fsdp2 else f"on {accelerator.device.type}"
    raise ConfigError(
        f"--auto_micro_batch tries what the memory of a GPU holds, which does not work {what}",
        fix="give --micro_batch_size, the samples that a process computes at once",
    )


def largest(share: int, fits: Callable[[int], bool]) -> int:
    """The first that fits of a process's share, its halves, its thirds, ..., even since MixUp pairs; 0 for none."""
    parts = {-(-share // count) for count in range(1, share + 1)}
    sizes = sorted({min(share, even_parts(share, part + part % 2)) for part in parts}, reverse=True)
    first = bisect.bisect_left(sizes, True, key=fits)
    return sizes[first] if first < len(sizes) else 0


def fits(config: Config, model: nn.Module, images: tuple[int, int, int], size: int, accelerator: Accelerator) -> bool:
    """Whether so many images can be trained on beside all that a run keeps. The model stays as it is."""
    device = accelerator.device
    buffers = [buffer.clone() for buffer in model.to(device).buffers()]
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        train_on_nothing(config, model, images, size, accelerator)
        if device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction())
        left = min(free + torch.cuda.memory_reserved(device), allowed) - torch.cuda.max_memory_allocated(device)
        return left >= SPARE * allowed
    except RuntimeError as error:  # cuBLAS and cuDNN have words of their own
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in TOO_MUCH):
            return False
        raise
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def train_on_nothing(
    config: Config, model: nn.Module, images: tuple[int, int, int], size: int, accelerator: Accelerator
) -> None:
    """A step on black images that moves no weight, with all in memory that a run keeps there."""
    device = accelerator.device
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    averaged = config.ema_decay > 0 or config.swa_start_epoch is not None
    copies = averaged + (accelerator.num_processes > 1)  # averages; DDP's buckets
    kept: list[Any] = [torch.empty_like(weight) for weight in weights for _ in range(copies)]
    at_hand = 2 * largest_share(config, accelerator)  # the step's images, and those of the next
    kept.append(torch.empty(at_hand, *images, dtype=torch.uint8, device=device))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for optimizer in build_optimizers(model, config):
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # its states appear
        optimizer.step()
        kept.append(optimizer)
    with accelerator.autocast():
        outputs = model.train()(torch.zeros(size, *images, dtype=torch.uint8, device=device))
    torch.stack([out.float().mean() for out in tree_leaves(outputs) if isinstance(out, Tensor)]).sum().backward()
