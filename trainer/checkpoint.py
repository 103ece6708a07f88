"""The checkpoint folder: it appears whole by one rename, and proves itself by a manifest.

checkpoints/step_00001200/ holds what Accelerate saved (model.safetensors, optimizer.bin), ema.safetensors,
config.json of the model, state.json, and manifest.json (size and sha256 of each file), written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from configs.errors import UserError

MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8,})")


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for anything else."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, oldest first; whatever else lies there is none of ours."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if step_of(folder) is not None and folder.is_dir()]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def begin(checkpoints: Path, step: int) -> Path:
    """A hidden, empty folder on the same filesystem; what killed saves left goes."""
    tidy(checkpoints)
    hidden = checkpoints / f".step_{step:08d}"
    hidden.mkdir()
    return hidden


def commit(hidden: Path) -> Path:
    """Write the manifest of what lies in the folder, make all of it durable, and let it appear."""
    for useless in hidden.glob("random_states_*.pkl"):
        useless.unlink()  # generators are seeded every step, from the config
    files = sorted(path for path in hidden.iterdir() if path.is_file())
    manifest = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (hidden / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, hidden / MANIFEST]:
        path.chmod(0o644)
        sync(path)
    sync(hidden)
    final = hidden.with_name(hidden.name[1:])
    replaced = hidden.with_name(f".replaced_{final.name}")
    if final.exists():  # the same step, saved before its evaluation; `tidy` puts it back if we are killed here
        os.rename(final, replaced)
    os.rename(hidden, final)
    sync(hidden.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def tidy(checkpoints: Path) -> None:
    """Finish what a killed process had begun with its checkpoints; only the owner of the run may call it."""
    for left in checkpoints.glob(".replaced_step_*"):
        final = left.with_name(left.name.removeprefix(".replaced_"))
        if step_of(final) is not None:
            shutil.rmtree(left, ignore_errors=True) if final.exists() else os.rename(left, final)
    for prefix in (".removed_", "."):  # half removed, half written
        for left in checkpoints.glob(f"{prefix}step_*"):
            if step_of(left.with_name(left.name.removeprefix(prefix))) is not None:
                shutil.rmtree(left, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None where all of it holds."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if strange := sorted({path.name for path in folder.iterdir()} - {MANIFEST, *manifest}):
            return f"{strange[0]} is not in the manifest"
        for name, entry in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    try:
        step = read_state(folder)["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read: {error}"
    return None if step_of(folder) in (None, step) else f"state.json is of step {step}"


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that holds, and a line for each newer one that does not.

    Raises UserError where there are checkpoints and none holds: starting from zero would lose the run.
    """
    damaged: list[str] = []
    for folder in reversed(all_checkpoints(checkpoints)):
        wrong = fault(folder)
        if wrong is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder.name} is damaged and passed over: {wrong}")
    if damaged:
        raise UserError(
            "none of the checkpoints is intact: " + "; ".join(damaged),
            where=str(checkpoints),
            fix="restore one, or begin anew under another --experiment_name",
        )
    return None, damaged


def read_state(folder: Path) -> dict[str, Any]:
    """What `trainer.state.TrainState` says of itself."""
    return json.loads((folder / "state.json").read_text())


def prune(checkpoints: Path, *, keep_last: int, keep_steps: set[int]) -> None:
    """Remove checkpoints that are neither among the newest nor wanted; nothing else is touched."""
    for folder in all_checkpoints(checkpoints)[:-keep_last]:
        if step_of(folder) not in keep_steps:
            removed = folder.with_name(f".removed_{folder.name}")
            os.rename(folder, removed)  # no half of a checkpoint ever bears its name
            shutil.rmtree(removed)


def set_aside(checkpoints: Path, step: int) -> list[str]:
    """Rename what was saved after a step that a run goes back to: it is of another course. A line for each."""
    lines = []
    for folder in all_checkpoints(checkpoints):
        if (step_of(folder) or 0) > step:
            names = (f"set_aside_{folder.name}" + (f"_{number}" if number else "") for number in range(1000))
            aside = next(folder.with_name(name) for name in names if not folder.with_name(name).exists())
            folder.rename(aside)
            lines.append(f"{folder.name} is of a course that is left here: now {aside.name}")
    return lines


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
