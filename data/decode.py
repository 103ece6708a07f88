"""From the bytes of an image file to a uint8 tensor."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from configs.errors import DataError

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "LA", "La", "F", *WIDE_MODES)


def open_image(file: Path | bytes, name: str) -> Image.Image:
    """An upright, decoded picture. Raises DataError that names the file."""
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises a dozen kinds for a bad file
        raise DataError(f"cannot decode an image: {error}", where=name, fix="repair or remove the file") from None


def channels_of(image: Image.Image) -> int:
    """1 for a grey picture, 3 for any other."""
    return 1 if image.mode in GREY_MODES else 3


def to_tensor(image: Image.Image, channels: int, name: str) -> torch.Tensor:
    """uint8 [channels, H, W]. 16-bit values keep their upper 8 bits; transparent pixels become white."""
    if image.mode in WIDE_MODES:
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide >> 8 if wide.max(initial=0) > 255 else wide, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise DataError(
            "an image of floating-point values has no known range", where=name, fix="save it as 8 or 16 bit"
        )
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    try:
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except ValueError as error:
        raise DataError(f"an image of mode {image.mode} cannot be converted: {error}", where=name) from None
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
