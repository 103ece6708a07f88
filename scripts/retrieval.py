"""A text in, the nearest images out."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

import models
from configs.errors import ConfigError, DataError
from data.decode import decode
from models.clip import CLIP
from scripts.prediction import image_files, predictions

TILE = 160  # pixels


def nearest(
    text: str, weights: str, inputs: list[Path], top: int, batch_size: int
) -> tuple[list[tuple[float, str]], list[tuple[str, str]]]:
    """(cosine, path) of the images that show the text most, best first; and (path, reason) of those that are none."""
    model = models.load(weights)
    if not isinstance(model, CLIP):
        raise ConfigError(
            f"{model.name} has learnt no texts", where=f"--weights {weights}", fix="scripts/predict.py names classes"
        )
    rows = list(predictions(model, list(image_files(inputs)), batch_size))
    good = [row for row in rows if "error" not in row]
    failed = [(row["path"], row["error"]) for row in rows if "error" in row]
    if not good:
        raise DataError(f"none of {len(rows)} images could be read: {failed[0][1]}", where=failed[0][0])
    images_ND = torch.tensor([row["embedding"] for row in good])
    with torch.no_grad():
        text_D = model.embed_texts(model.tokens([text]))[0].cpu()
    cosines, places = (images_ND @ text_D).topk(min(top, len(good)))
    return [(cosine, good[place]["path"]) for cosine, place in zip(cosines.tolist(), places.tolist())], failed


def draw(paths: list[str], output: Path) -> None:
    """The images from left to right, each TILE pixels high and wide."""
    sheet = Image.new("RGB", (TILE * len(paths), TILE))
    for place, path in enumerate(paths):
        image = to_pil_image(decode(Path(path).read_bytes(), path, 3))  # upright, as the model sees it
        sheet.paste(image.resize((TILE, TILE)), (TILE * place, 0))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
