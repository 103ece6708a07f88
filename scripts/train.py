"""Train a model: accelerate launch scripts/train.py [--config FILE] [--flag VALUE ...]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs uninstalled as well

from configs.arguments import parse  # imports no torch: help and faults answer at once


def main(argv: list[str]) -> int:
    config = parse(argv)
    from scripts.report import fail

    try:
        from scripts.session import run

        return run(config)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        return fail(error, debug=config.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
