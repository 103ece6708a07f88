"""Measure trained weights on the test split: scripts/test.py --weights runs/NAME

The weights may be a run, a checkpoint, a best/ folder, a safetensors file or a hub id. The data are those of the
run; every flag of train.py that says what the data are works here, too (--dataset, --test_data_dir, ...).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.arguments import parse


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="test.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--weights", required=True, help="what to measure")
    parser.add_argument("--on", choices=("test", "val", "train"), default="test", help="the split (default: test)")
    parser.add_argument("--tta", action="store_true", help="mean of the probabilities over several views of each image")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="zero-shot: texts with {} for a class: 'a photo of a {}'"
    )
    parser.add_argument("--class_names", nargs="+", default=[], help="words for the classes (default: their names)")
    arguments, flags = parser.parse_known_args(argv)
    run = run_of(Path(arguments.weights))
    config = parse([*(["--config", str(run / "config.yaml")] if run else []), *flags], prog="test.py")
    from scripts.report import fail

    try:
        from scripts.measure import measure

        weights = run / "best" if run == Path(arguments.weights) and run else arguments.weights
        metrics = measure(
            config, str(weights), arguments.on, arguments.prompts, arguments.class_names, tta=arguments.tta
        )
        if metrics is not None:
            show(metrics, arguments.on)
            record(metrics, arguments.on, Path(weights), run, tta=arguments.tta)
        return 0
    except Exception as error:
        return fail(error, debug=config.debug)


def run_of(weights: Path) -> Path | None:
    """The run folder that the weights lie in."""
    candidates = (weights, *list(weights.parents)[:3])
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def show(metrics: dict[str, float], split: str) -> None:
    for name, value in metrics.items():
        print(f"{split} {name:<16} {value:,.4f}" if name != "samples" else f"{split} {name:<16} {value:,.0f}")


def record(metrics: dict[str, float], split: str, weights: Path, run: Path | None, *, tta: bool) -> None:
    """Each look is written down: in the run's metrics.jsonl, else beside the weights."""
    import json

    from trainer.checkpoint import step_of
    from trainer.run_folder import RunFolder

    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    best = (RunFolder(run).read_status().get("best") or {}) if run else {}
    step = step_of(weights if weights.is_dir() else weights.parent) or best.get("step", 0)
    line = {"kind": "test", "split": split, "step": step, "weights": str(weights), "time": when, **metrics}
    line |= {"tta": True} if tta else {}
    folder = run or (weights if weights.is_dir() else weights.parent if weights.exists() else Path())
    file = folder / ("metrics.jsonl" if run else "test_metrics.jsonl")
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
