"""Find images by a text: scripts/retrieve.py --weights runs/NAME "a three above a seven" --images DIR [--top 5]

Prints a line an image, the nearest first: its cosine and its path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="retrieve.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("text", help="what the images should show")
    parser.add_argument("--weights", required=True, help="a run, a checkpoint, a best/ folder, a file or a hub id")
    parser.add_argument("--images", nargs="+", required=True, type=Path, help="images, or folders of them")
    parser.add_argument("--top", type=int, default=5, help="how many are shown (default: 5)")
    parser.add_argument("--output", type=Path, help="also a .png of them, side by side")
    parser.add_argument("--batch_size", type=int, default=64, help="images computed at once")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    from scripts.report import fail

    try:
        if min(arguments.top, arguments.batch_size) < 1:
            raise ConfigError("--top and --batch_size must be at least 1")
        if arguments.output and arguments.output.suffix != ".png":
            raise ConfigError(f"--output {arguments.output}: the name must end with .png")
        from scripts.retrieval import draw, nearest

        found, failed = nearest(
            arguments.text, arguments.weights, arguments.images, arguments.top, arguments.batch_size
        )
        for cosine, path in found:
            print(f"{cosine:7.4f}  {path}")
        print(*(f"left out  {path}: {reason}" for path, reason in failed), sep="\n", end="\n" if failed else "")
        if arguments.output:
            draw([path for _, path in found], arguments.output)
            print(f"drawn in {arguments.output}")
        return 0
    except Exception as error:
        return fail(error, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
