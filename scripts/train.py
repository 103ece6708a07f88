"""Train a model: accelerate launch scripts/train.py [--config FILE] [--flag VALUE ...]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs uninstalled as well

from configs.arguments import parse  # imports no torch: help and faults answer at once
from configs.environment import int_of
from configs.telling import is_first_here
from trainer import signals  # nor does this


def main(argv: list[str]) -> int:
    config = parse(argv)
    if config.use_multigpu and "WORLD_SIZE" not in os.environ:
        from scripts.multi_gpu import start_on_all_gpus

        start_on_all_gpus(argv)
    with signals.noted():  # before the long imports: a signal is answered from here on
        from scripts.report import fail, leave, outlive_readers

        several = int_of("WORLD_SIZE") > 1
        outlive_readers()
        try:
            from scripts.session import run

            code = run(config)
        except signals.Preempted as stop:
            if is_first_here():  # a launcher stops the others, too, as soon as one has failed
                print(f"stopped by {stop.reason} before training, with nothing to save", file=sys.stderr)
            code = 75
        except Exception as error:
            code = fail(error, debug=config.debug)  # of several processes, the others notice it by the end of this one
        if several:
            leave(code)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
