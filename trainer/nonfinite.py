"""Losses and gradients that are not finite: noticed before the update, on every process at the same step."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from configs.errors import Diverged
from data.order import TrainOrder
from trainer.metrics import CURE
from trainer.run_folder import write_whole

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer

IDS_SHOWN = 8


class NonFinite:
    """Keeps updates that are not finite from being made, and answers them as `--nonfinite` says.

    On a CPU each norm is looked at. With CUDA that would wait for the device: there fused optimizers are told by a
    tensor to leave everything as it is, and the host looks at log lines. GradScaler does so by itself for gradients.
    """

    def __init__(self, trainer: BaseTrainer):
        self.trainer = trainer
        fused = all(optimizer.defaults.get("fused") for optimizer in trainer.optimizers)
        self.looks_at_once = trainer.scaler is None and (trainer.device.type != "cuda" or not fused)
        self.pending: list[tuple[int, float, Tensor]] = []  # steps, their learning rates, whether they were bad
        saved = trainer.plain_model.state_dict(keep_vars=True).items()  # others, as the pixels' mean, do not change
        named = {name: t for name, t in saved if t.is_floating_point() and not isinstance(t, Parameter)}
        averages = trainer.ema.average if trainer.ema is not None else {}
        self.buffers = [*named.values(), *(averages[name] for name in named if name in averages)]
        self.losses_are_finite = True
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=trainer.device)  # of this step, where a scaler is used
        self.good_buffers = [buffer.clone() for buffer in self.buffers]

    def remember_buffers(self) -> None:
        """Those of now are good, and their averages."""
        if self.buffers:
            with torch.no_grad():
                torch._foreach_copy_(self.good_buffers, self.buffers)

    def begin_step(self) -> None:
        """Before the forward: one NaN in it would stay in BatchNorm's averages for ever."""
        self.losses_are_finite = True
        if self.trainer.scaler is not None:
            self.bad_loss = torch.zeros_like(self.bad_loss)
        if self.looks_at_once:
            self.remember_buffers()

    def looked_at(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch. Where it cannot be looked at by all processes, one that is not finite makes
        every gradient NaN, and with it the norm on all of them."""
        if self.looks_at_once and self.trainer.reduce is None:
            self.losses_are_finite = self.losses_are_finite and math.isfinite(loss.item())
            return loss
        if self.trainer.scaler is not None:
            self.bad_loss = self.bad_loss | ~loss.detach().isfinite()
        return loss * (1 + 0 * loss.detach())

    def allows_update(self, norm: Tensor) -> bool:
        """Whether to call the optimizers, which may have been told to do nothing."""
        step = self.trainer.state.step + 1
        if self.looks_at_once:
            if math.isfinite(norm.item()) and self.losses_are_finite:
                return True
            self.pending.append((step, self.trainer.lr, torch.tensor(True)))
            self.trainer.grad_norm = norm * math.nan  # several processes have no other
            return False
        if self.trainer.scaler is None:
            bad = ~norm.isfinite()
        else:  # it lowers its scale until gradients are finite; a loss that is not is no matter of scale
            reduce = self.trainer.reduce
            bad = self.bad_loss if reduce is None else reduce(self.bad_loss.float()) > 0
        self.pending.append((step, self.trainer.lr, bad))
        if self.trainer.scaler is None:
            for optimizer in self.trainer.optimizers:
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        return True

    def settle(self) -> None:
        """Answer what was not finite since the last call. Raises Diverged where the run has to stop."""
        pending, self.pending = self.pending, []
        were_bad = torch.stack([bad for *_, bad in pending]).tolist() if pending else []
        rates = {step: lr for (step, lr, _), was_bad in zip(pending, were_bad) if was_bad}
        if not rates:
            if not self.looks_at_once:
                self.remember_buffers()
            return
        if self.buffers:
            with torch.no_grad():
                torch._foreach_copy_(self.buffers, self.good_buffers)
        for steps in [[step] for step in rates] if self.trainer.config.nonfinite == "skip" else [[*rates]]:
            self.answer(steps, rates[steps[0]])

    def answer(self, steps: list[int], lr: float) -> None:
        """What is done about these steps; lr: of the first, which is the one that is told."""
        trainer, config, first = self.trainer, self.trainer.config, steps[0]
        what = self.describe(first, lr)
        self.write_capsule(first, lr, what)
        trainer.state.nonfinite_steps += len(steps)
        so_far = trainer.state.nonfinite_steps
        if config.nonfinite == "stop":
            raise Diverged(what, fix=CURE)
        if so_far > config.max_nonfinite:
            raise Diverged(f"{what}, as {so_far - 1} steps before; --max_nonfinite is {config.max_nonfinite}", fix=CURE)
        place = {"step": first, "epoch": trainer.state.epoch, "count": len(steps), "policy": config.nonfinite}
        if config.nonfinite == "rollback":
            place["weights_of"] = trainer.roll_back()
        trainer.run.log("nonfinite", place)
        if trainer.is_main:
            then = f"weights of step {place['weights_of']}" if "weights_of" in place else "no update"
            print(f"{what}: {then} ({so_far} of at most {config.max_nonfinite})", flush=True)

    def describe(self, step: int, lr: float) -> str:
        """What was not finite, with the learning rate and the first sample ids."""
        ids = self.draw(step)["ids"]
        shown = ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")
        samples = f", samples {shown}" if ids else ""
        named = [(name, value) for name, values in self.losses(step).items() for value in values]
        bad = [f"{name} is {value}" for name, value in named if not math.isfinite(value)]
        what = bad[0] if bad else "the norm of the gradient is not finite"
        return f"{what} at step {step} (lr {lr:g}{samples})"

    def write_capsule(self, step: int, lr: float, what: str) -> None:
        """All that names the step: `scripts/replay.py RUN --step N` computes it again."""
        trainer = self.trainer
        capsule = {
            "step": step,
            "epoch": trainer.state.epoch,
            "what": what,
            "lr": lr,
            "losses": {name: list(map(repr, values)) for name, values in self.losses(step).items()},
            **self.draw(step),
        }
        if trainer.run.writes:
            folder = trainer.run.path / "nonfinite"
            folder.mkdir(exist_ok=True)
            write_whole(folder / f"step_{step:08d}.json", json.dumps(capsule))

    def losses(self, step: int) -> dict[str, list[float]]:
        """Of the step's micro-batches, those of one process after the other."""
        found: dict[str, list[float]] = {}
        for losses, _, of_step in self.trainer.meter.losses:
            if of_step == step:
                for name, value in (losses if isinstance(losses, dict) else {"loss": losses}).items():
                    found.setdefault(name, []).append(float(value))
        of_all = self.trainer.processes.told_by_all(found)
        return {name: [value for of_one in of_all for value in of_one.get(name, [])] for name in found}

    def draw(self, step: int) -> dict[str, list[Any]]:
        """Sample ids and augmentation keys of the global batch, where an order made it."""
        trainer = self.trainer
        order = getattr(trainer.train_loader, "order", None)
        if not isinstance(order, TrainOrder):
            return {"ids": [], "keys": []}
        place = (trainer.state.step_in_epoch - 1 - (trainer.state.step - step)) * order.batch_size
        draw = order.draw(trainer.state.epoch, place, place + order.batch_size)
        return {"ids": draw.ids.tolist(), "keys": [f"{key:016x}" for key in draw.keys.tolist()]}
