"""The Accelerator of a run: device, precision and processes, with what would silently go wrong refused."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.environment import cores, int_of, is_on
from configs.errors import ConfigError
from configs.options import Config
from trainer import launch, sharding, signals
from trainer.windows import as_dict


def make_accelerator(config: Config) -> Accelerator:
    """CUDA, MPS or CPU, whichever is there. Raises ConfigError for a precision or launch that cannot work."""
    launch.check_environment()
    launch.check_requests()
    fsdp = sharding.asked_for()
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    use_cpu = no_gpu or is_on("ACCELERATE_USE_CPU")
    precision: str | None = config.mixed_precision
    if precision == "auto":
        precision = "fp16" if torch.cuda.is_available() and not use_cpu else "bf16"
    wanted = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "fp16", "bf16"):
        raise ConfigError(f"the launcher asks for {wanted} precision", fix="take --mixed_precision bf16, fp16 or no")
    if wanted == "fp16" and use_cpu:
        raise ConfigError(
            f"{'--mixed_precision fp16' if precision else 'fp16, which the launcher asks for,'} needs a GPU, and none "
            "is used (on a CPU it would silently train in float32)",
            fix="take --mixed_precision bf16 or no",
        )
    if wanted == "fp16" and config.optimizer == "muon":
        raise ConfigError(
            "--optimizer muon does not go with fp16: where gradients are too large for it, one of its two parts would "
            "still step",
            fix="take --mixed_precision bf16 or no",
        )
    if config.dtype == "float64" and (wanted != "no" or not (use_cpu or torch.cuda.is_available())):
        where = f"with --mixed_precision {wanted}" if wanted != "no" else "on MPS"
        raise ConfigError(f"--dtype float64 cannot be had {where}", fix="take --mixed_precision no, and a CPU or CUDA")
    if wanted == "bf16" and torch.cuda.is_available() and not use_cpu and not can_bf16():
        raise ConfigError(
            f"{torch.cuda.get_device_name()} cannot compute in bf16", fix="take --mixed_precision fp16 or no"
        )
    try:
        with signals.as_usual() if launch.started() > 1 else nullcontext():  # it waits until all have come
            accelerator = Accelerator(cpu=use_cpu, mixed_precision=wanted, fsdp_plugin=fsdp)
    except ValueError as error:  # a second trainer of another precision in one process
        already = "this process has an Accelerator already" if "already been init" in str(error) else "Accelerate"
        raise ConfigError(f"{already}: {str(error).splitlines()[0]}") from None
    started = int_of("WORLD_SIZE")
    if accelerator.num_processes != started:
        raise ConfigError(
            f"the launcher started {started} processes, but they do not know each other "
            f"(each sees {accelerator.num_processes})",
            fix="without GPUs: accelerate launch --config_file accelerate_configs/cpu_2.yaml scripts/train.py",
        )
    if fsdp is not None:
        sharding.check_it_is_there(accelerator)
        sharding.check_options(config, accelerator.mixed_precision)
    if config.expect_processes not in (None, started):
        raise ConfigError(
            f"--expect_processes {config.expect_processes}, but the launcher started {started}",
            fix="see `Several processes` in the README: some ways to start several start one",
        )
    return accelerator


def can_bf16() -> bool:
    """In hardware: GPUs before Ampere emulate parts of it, and have no convolutions."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def set_algorithms(config: Config) -> None:
    """Before anything is computed: CUDA's libraries read the variable once."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def default_threads(processes_here: int) -> int:
    """The cores that there are, shared out over the processes of this machine."""
    return max(1, cores() // max(1, processes_here))


def moved_ahead(
    items: Iterable[Any], device: torch.device, move: Callable[[Any], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each batch on the device. With CUDA the next one travels on a stream of its own while this one is computed on."""
    if device.type != "cuda":
        yield from map(move, items)
        return
    copies = copy_stream(device)
    waiting: tuple[dict[str, Any], torch.cuda.Event] | None = None
    for item in items:
        there_already = any(isinstance(value, Tensor) and value.is_cuda for value in as_dict(item).values())
        with torch.cuda.stream(None if there_already else copies):  # what is being computed is not read elsewhere
            batch = move(item)
        following = batch, copies.record_event()
        if waiting is not None:
            yield arrived(*waiting)
        waiting = following
    if waiting is not None:
        yield arrived(*waiting)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps what was freed for the stream that it was used on."""
    return torch.cuda.Stream(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. From memory that is not pinned a copy waits for all that is computed there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def arrived(batch: dict[str, Any], copied: torch.cuda.Event) -> dict[str, Any]:
    """The batch, once its copy is done; its memory stays until what computes on it is done, too."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(computing)
    return batch
