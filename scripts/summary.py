"""What a model costs on its data, without training it: scripts/summary.py [flags of train.py]"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.arguments import parse


def main(argv: list[str]) -> int:
    config = parse(argv, prog="summary.py")
    from scripts.report import fail

    try:
        from models.summary import summarize
        from scripts.wiring import build_data, build_model, check_names, titled

        check_names(config)
        config, data, lines = build_data(config)
        model = build_model(config, data)
        for name, part in model.named_modules():
            depth = name.count(".")
            own = sum(p.numel() for p in part.parameters())
            if name and own and depth < 3:
                print(f"{'  ' * depth}{name:<{36 - 2 * depth}} {type(part).__name__:<24} {own:>12,}")
        batch = min(config.micro_batch_size, config.batch_size)
        print(f"{titled(config)}: {summarize(model, data.info.channels, data.image_size, batch)}")
        print(*lines, sep="\n", end="\n" if lines else "")
        return 0
    except Exception as error:
        return fail(error, debug=config.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
