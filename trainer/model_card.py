"""The README.md of a saved model."""

from __future__ import annotations

from typing import Any

from configs.arguments import NOT_SAVED, to_yaml
from configs.options import Config


def model_card(
    config: Config, described: dict[str, Any], metrics: dict[str, float], step: int, part: str, usage: str
) -> str:
    """What the model is, what it reached, how to load it, and the config that made it."""
    size = described["preprocess"]["image_size"]
    data = config.train_data_dir or config.dataset
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    options = to_yaml(config, without=NOT_SAVED)
    classes = described["classes"]
    has_classes = described.get("labels", {}).get("kind", "classes") in ("classes", "multi_label")
    of_classes = f" of {len(classes)} classes" if classes and has_classes else ""
    return f"""---
library_name: pytorch
license: other
tags:
- {described["task"]}
- model_hub_mixin
- pytorch_model_hub_mixin
---

# {described["model"]}

Trained for {described["task"]}{of_classes} on `{data}`, images of {size}x{size} pixels.

{part} metrics after {step} steps:

| metric | value |
|---|---|
{rows}

```python
import models

model = models.load("path/or/hub-id")  # takes images uint8 [B, C, {size}, {size}] as they are
{usage}
```

The config of the run (`scripts/train.py --config`):

```yaml
{options}```
"""
