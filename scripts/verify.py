"""Check that runs can be continued and used: scripts/verify.py RUN [RUN ...]

A RUN is a run folder or one of its checkpoints. Each checkpoint is held against its manifest, its state.json is read,
and all weights are searched for values that are not finite; best/ is loaded. Nothing is changed on the disk.
Exit code: 0 where all hold, 1 where one does not, 2 where a path is no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.errors import ConfigError

LINE_WIDTH = 80
BAR_AFTER_SECONDS = 2.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="verify.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    arguments = parser.parse_args(argv)
    from scripts.report import fail

    try:
        return 0 if verify({run: folders_of(run) for run in arguments.runs}) else 1
    except Exception as error:
        return fail(error, debug=False)


def folders_of(run: Path) -> list[Path]:
    """What there is to check of a run: its checkpoints, oldest first, and best/. A checkpoint is its own only one."""
    from trainer.checkpoint import all_checkpoints, step_of

    if step_of(run.resolve()) is not None and run.is_dir():
        return [run.resolve()]
    if not (run / "config.yaml").is_file() and not (run / "checkpoints").is_dir():
        raise ConfigError(
            "this is neither a run nor a checkpoint",
            where=str(run),
            fix="give runs/NAME or runs/NAME/checkpoints/step_XXXXXXXX",
        )
    return all_checkpoints(run / "checkpoints") + [best for best in [run / "best"] if best.is_dir()]


def verify(folders: dict[Path, list[Path]]) -> bool:
    """Print a line a folder, under the name of its run; whether all of them hold."""
    from tqdm import tqdm

    sizes = {folder: size_bytes(folder) for some in folders.values() for folder in some}
    all_hold = True
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, leave=False, delay=BAR_AFTER_SECONDS, disable=None
    ) as bar:
        for run, some in folders.items():
            bar.clear()
            print(run if some else f"{run}: no checkpoints yet", flush=True)
            for folder in some:
                wrong = fault(folder)
                bar.clear()
                print(line(folder.name, sizes[folder], wrong or "ok"), flush=True)
                bar.update(sizes[folder])
                all_hold &= wrong is None
    return all_hold


def line(name: str, size: int, verdict: str) -> str:
    text = f"{name:<13} {size / 1e6:8,.1f} MB  {' '.join(verdict.split())}"
    return text if len(text) <= LINE_WIDTH else text[: LINE_WIDTH - 3] + "..."


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint or with best/; None where all of it holds."""
    from trainer import checkpoint

    if checkpoint.step_of(folder) is None:
        return weights_fault(folder) or load_fault(folder)
    return checkpoint.fault(folder) or weights_fault(folder)


def weights_fault(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors"))
    return next(filter(None, map(tensor_fault, files)), None) if files else "there are no weights"


def tensor_fault(file: Path) -> str | None:
    """The first tensor that is not finite. One at a time is in memory, however large the file is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                tensor = tensors.get_tensor(name)
                # aminmax gives NaN where one value is; unlike isfinite it needs no memory of its own
                extremes = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
                if not all(value.isfinite() for value in extremes):
                    return f"{file.name}: {name} is not finite"
    except (SafetensorError, OSError, RuntimeError) as error:
        return f"{file.name} cannot be read: {error}"
    return None


def load_fault(folder: Path) -> str | None:
    import models

    try:
        models.load(str(folder))
    except Exception as error:  # whatever a broken file leads to is what is wrong with it
        return f"cannot be loaded: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
