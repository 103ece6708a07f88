"""A small run of detection for tests: `scripts/train.py` with few scenes and a narrow detector `tiny_fcos`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import digit_scenes
from models.detection import DETECTORS, SmallFCOS
from tests.bn_net import let_fsdp_be_on_cpu

digit_scenes.SCENES |= {"train": 64, "val": 19, "test": 3}
DETECTORS["tiny_fcos"] = partial(SmallFCOS, width=16)

if __name__ == "__main__":
    if os.environ.get("FSDP_ON_CPU"):
        let_fsdp_be_on_cpu()
    from scripts.train import main

    sys.exit(main(sys.argv[1:]))
