"""TensorBoard and Weights & Biases, each in a thread of its own: one that fails or hangs never stops a run."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.options import Config
from configs.secrets import hide_secrets

FINISH_SECONDS, STOPPED_SECONDS = 60.0, 5.0  # to wait for at the end; where the run was asked to stop


class Tracker:
    """Takes lines from a queue and hands them to a backend, which is made in the thread as well."""

    def __init__(self, name: str, open_backend: Any):
        self.name, self.failed = name, False
        self._lines: queue.Queue[Any] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, args=(open_backend,), daemon=True, name=f"tracker-{name}")
        self._thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers, and pictures as uint8 [3, H, W]."""
        if not self.failed:
            try:
                self._lines.put_nowait((values, step))
            except queue.Full:
                self._give_up("it has not taken a line for long")

    def finish(self, best: Path | None, *, seconds: float = FINISH_SECONDS) -> None:
        """Hand over the best model, write what is left, and wait for it, but not for ever."""
        if self.failed:
            return
        with suppress(queue.Full):  # then it hangs, and is waited for in vain
            self._lines.put_nowait((best, None))
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"it did not finish in {seconds:.0f} s")

    def _work(self, open_backend: Any) -> None:
        try:
            backend = open_backend()
            while True:
                values, step = self._lines.get()
                if step is None:
                    return backend.finish(values)
                backend.log(values, step)
        except Exception as error:  # whatever a tracker raises, the run goes on
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            why = hide_secrets(reason)[:200]
            print(f"warning: {self.name} stopped ({why}); the run goes on, metrics.jsonl is complete", flush=True)


def open_trackers(config: Config, folder: Path, run_id: str) -> list[Tracker]:
    """Those that the config asks for; run_id lets a resumed run go on where it was."""
    found = []
    if config.use_tensorboard:
        found.append(Tracker("TensorBoard", lambda: TensorBoard(folder / "tensorboard", asdict(config))))
    if config.use_wandb:
        project, name = config.wandb_project, folder.name
        found.append(Tracker("W&B", lambda: WeightsAndBiases(folder, asdict(config), project, name, run_id)))
    return found


class TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        others = set(threading.enumerate())
        self.writer = SummaryWriter(str(folder))
        hush(set(threading.enumerate()) - others)
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.writer.add_image(name, value, step)
            else:
                self.writer.add_scalar(name, value, step)

    def finish(self, best: Path | None) -> None:
        self.writer.close()


def hush(threads: set[threading.Thread]) -> None:
    """What ends a backend's own thread is raised by the next line it is given, too: no traceback as well."""
    show = threading.excepthook
    threading.excepthook = lambda args: None if args.thread in threads else show(args)


class WeightsAndBiases:
    def __init__(self, folder: Path, config: dict[str, Any], project: str, name: str, run_id: str):
        import wandb

        self.run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", config=config, dir=str(folder),
            settings=wandb.Settings(silent=True, disable_git=True),  # the remote of a repository may hold a password
        )  # fmt: skip
        self.artifact = wandb.Artifact(f"model-{run_id}", type="model")

    def log(self, values: dict[str, Any], step: int) -> None:
        import wandb

        shown = {n: wandb.Image(v.permute(1, 2, 0).numpy()) for n, v in values.items() if isinstance(v, Tensor)}
        # an own step axis: wandb drops what goes back, as a resumed run does
        self.run.log({**values, **shown, "step": step})

    def finish(self, best: Path | None) -> None:
        if best is not None and best.is_dir():
            self.artifact.add_dir(str(best))
            self.run.log_artifact(self.artifact)
        self.run.finish()
