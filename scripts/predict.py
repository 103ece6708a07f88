"""Predict the classes of images, or the boxes on them:
scripts/predict.py --weights runs/NAME IMAGE_OR_FOLDER ... [--output FILE] [--draw FOLDER]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--weights", required=True, help="a run, a checkpoint, a best/ folder, a file or a hub id")
    parser.add_argument("inputs", nargs="+", type=Path, help="images, or folders of them")
    parser.add_argument("--output", type=Path, default=Path("predictions.jsonl"), help=".jsonl or .csv")
    parser.add_argument("--batch_size", type=int, default=64, help="images computed at once")
    parser.add_argument("--tta", action="store_true", help="mean of the probabilities over several views of each image")
    parser.add_argument("--draw", type=Path, help="a folder for the pictures with the boxes that were found")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    from scripts.report import fail

    try:
        if arguments.output.suffix not in (".jsonl", ".csv"):
            raise ConfigError(f"--output {arguments.output}: the name must end with .jsonl or .csv")
        if arguments.batch_size < 1:
            raise ConfigError(f"--batch_size is {arguments.batch_size}: it must be at least 1")
        from scripts.prediction import predict_files, write

        weights, inputs = arguments.weights, arguments.inputs
        rows = predict_files(weights, inputs, arguments.batch_size, tta=arguments.tta, draw=arguments.draw)
        written, failed = write(rows, arguments.output)
        print(
            f"{written} predictions written to {arguments.output}"
            + (f", {failed} files could not be read" if failed else "")
        )
        return 0
    except Exception as error:
        return fail(error, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
