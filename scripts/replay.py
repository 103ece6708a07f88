"""Compute one step of a run again: scripts/replay.py RUN --step N [--flag VALUE ...]

One process starts from the newest intact checkpoint before the step, or from the beginning, and shows the step's
loss, gradient norm, learning rate and samples. They are compared with what the run wrote of that step. The run folder
is only read. Flags of train.py are taken, too, where data or options are not what they were (--train_data_dir DIR).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.arguments import parse
from configs.errors import ConfigError
from trainer import signals


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="replay.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--step", type=int, required=True, help="the step to compute again, counted from 1")
    parser.add_argument("--processes", type=int, help="processes that the run had then (default: as it had last)")
    arguments, flags = parser.parse_known_args(argv)
    with signals.noted():
        from scripts.report import fail

        try:
            if not (arguments.run / "config.yaml").is_file():
                raise ConfigError("there is no run: no config.yaml", where=str(arguments.run), fix="give runs/NAME")
            config = parse(["--config", str(arguments.run / "config.yaml"), *flags], prog="replay.py")
            from scripts.replaying import replay

            return replay(arguments.run, arguments.step, config, arguments.processes)
        except signals.Preempted as stop:
            print(f"stopped by {stop.reason}", file=sys.stderr)
            return 75
        except Exception as error:
            return fail(error, debug="--debug" in flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
