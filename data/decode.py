"""From the bytes of a picture to a uint8 tensor: the part that is asked for, at the size that is asked for.

The content decides what a file is, never its name. Colours are taken as they are stored: ICC profiles are ignored.
Transparent pixels become white. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode

from configs.errors import DataError
from data.geometry import Box, Plan, whole
from data.jpeg import plain_frame

# What is opened, and the memory that decoding and converting a pixel takes at most, in bytes.
FORMATS = {"JPEG": 9, "PNG": 12, "BMP": 12, "PPM": 12, "TIFF": 12, "GIF": 12, "WEBP": 21, "AVIF": 21}
MEMORY_BYTES = 470_000_000  # of one picture: 52 megapixels as JPEG, 39 as PNG, 22 as WebP
WIDE_MODES, WIDE_BYTES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"), 16
STRIP_ROWS = 256
HALVED_PIXELS = 500_000  # no smaller JPEG picture is decoded at 1/2: Pillow then loses more in resizing than it saves
GREY_MODES = ("1", "L", "LA", "La", *WIDE_MODES)
TRANSPOSED, ROWS_FLIPPED, COLUMNS_FLIPPED = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)  # orientations, EXIF tag 274
METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # Pillow's names of what may tell a rotation

# Pillow warns below its own limit of size, which is higher than ours.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def channels_of(data: bytes, name: str) -> int:
    """1 for a grey picture, 3 for any other, from the header alone. Raises DataError if it is no picture."""
    with named(name):
        return 1 if opened(data).mode in GREY_MODES else 3


class Header(NamedTuple):
    """What is known of a picture before its pixels are decoded; its size as stored."""

    height: int
    width: int
    orientation: int
    plain_bands: int  # of a JPEG picture of 1 (grey) or 3 bands; 0 of any other, which Pillow decodes
    image: ImageFile.ImageFile | None = None  # None where Pillow did not have to open it


def decode(
    data: bytes, name: str, channels: int, plan: Plan | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 [channels, H, W], upright: the part that plan takes of it, resized, or the whole at its own size.

    16-bit values keep their upper 8 bits, unless all fit in the lower ones. Floating-point values are scaled by 255
    if they lie in 0..1, and rounded if in 0..255. Raises DataError that names the file for any other, for a damaged
    one, and for one of too many pixels; which files are bad does not depend on plan. Written to out, if that is given.
    """
    with named(name):
        header = header_of(data)
    orientation, size = header.orientation, (header.height, header.width)
    if orientation in TRANSPOSED:
        size = size[::-1]
    box, out_size = plan(*size) if plan else (whole(*size), size)
    stored_box = box_as_stored(box, orientation, *size)
    stored_size = out_size[::-1] if orientation in TRANSPOSED else out_size
    with named(name):
        if header.plain_bands:
            part_CHW = cut_jpeg(header, data, stored_box, stored_size, channels, out if orientation == 1 else None)
        else:
            part_CHW = cut_any(header.image or opened(data), stored_box, stored_size, channels)
    if part_CHW is out:
        return out
    image_CHW = upright(part_CHW, orientation).expand(channels, -1, -1)
    return image_CHW.contiguous() if out is None else out.copy_(image_CHW)


def crop_resized(image_CHW: torch.Tensor, plan: Plan, out: torch.Tensor | None = None) -> torch.Tensor:
    """The same for pixels that are decoded already: uint8 in and out, contiguous; the input where nothing changes."""
    box, out_size = plan(*image_CHW.shape[1:])
    return resized(cropped(image_CHW, box), out_size, out).contiguous()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Whatever a bad file raises becomes a DataError that names it."""
    try:
        yield
    except DataError as error:
        raise DataError(error.what, where=name, fix=error.fix) from None
    except Exception as error:  # Pillow raises a dozen kinds
        raise DataError(f"cannot decode an image: {error}", where=name, fix="repair or remove the file") from None


def opened(data: bytes) -> ImageFile.ImageFile:
    """A picture whose header is read, and no more."""
    try:
        image = Image.open(io.BytesIO(data), formats=list(FORMATS))
    except UnidentifiedImageError:
        what = "this is no picture in a format that is read" if data else "the file is empty"
        raise DataError(f"cannot decode an image: {what}", fix=f"formats: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:  # before even we are told the size
        raise DataError("cannot decode an image: it has more than 178 megapixels", fix="make it smaller") from None
    format_bytes = FORMATS.get(str(image.format), FORMATS["JPEG"])  # MPO: several JPEG pictures in one file
    bytes_per_pixel = max(format_bytes, 3 * len(image.getbands()), WIDE_BYTES if image.mode in WIDE_MODES else 0)
    if image.width * image.height * bytes_per_pixel > MEMORY_BYTES:
        limit = MEMORY_BYTES / bytes_per_pixel / 1e6
        raise DataError(
            f"a picture of {image.width}x{image.height} pixels is too large to be decoded",
            fix=f"at most {limit:.0f} megapixels of this kind: make it smaller or remove it",
        )
    return image


def check_complete(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse damage that Pillow lets pass as pixels: files whose end was never written, and is zeros."""
    if image.format == "JPEG" and image.fp is not None and data.rfind(b"\xff\xd9") < image.fp.tell():
        raise ValueError("the end of the JPEG data is missing")  # thumbnails in the header have an end too
    if image.format == "PNG":
        place, view = 8, memoryview(data)
        while place + 12 <= len(data):
            end = place + 8 + int.from_bytes(view[place : place + 4])
            is_pixels = view[place + 4 : place + 8] == b"IDAT"
            if is_pixels and zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
                raise ValueError("a checksum of the PNG data is wrong")
            place = end + 4


def header_of(data: bytes) -> Header:
    frame = plain_frame(data)
    if frame is not None and frame.height * frame.width * FORMATS["JPEG"] <= MEMORY_BYTES:
        return Header(frame.height, frame.width, 1, frame.bands)
    image = opened(data)
    check_complete(image, data)
    plain_bands = {"L": 1, "RGB": 3}.get(image.mode, 0) if image.format in ("JPEG", "MPO") else 0
    if not plain_bands:
        image.load()  # a PNG may tell its orientation behind the pixels
    return Header(image.height, image.width, orientation_of(image), plain_bands, image)


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as in EXIF; 1 where the metadata say nothing or are damaged."""
    if METADATA.isdisjoint(image.info):
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as many kinds; the pixels are good whatever stands beside them
        return 1
    return orientation if orientation in range(1, 9) else 1


def box_as_stored(box: Box, orientation: int, height: int, width: int) -> Box:
    """Where a box of the upright picture, of this height and width, lies in the stored one: `upright` undone."""
    top, left, box_height, box_width = box
    if orientation in ROWS_FLIPPED:
        top = height - top - box_height
    if orientation in COLUMNS_FLIPPED:
        left = width - left - box_width
    return Box(left, top, box_width, box_height) if orientation in TRANSPOSED else Box(top, left, box_height, box_width)


def upright(stored_CHW: torch.Tensor, orientation: int) -> torch.Tensor:
    if orientation in TRANSPOSED:
        stored_CHW = stored_CHW.transpose(1, 2)
    axes = [axis for axis, flipped in ((1, ROWS_FLIPPED), (2, COLUMNS_FLIPPED)) if orientation in flipped]
    return stored_CHW.flip(axes) if axes else stored_CHW


def cut_jpeg(
    header: Header, data: bytes, box: Box, out_size: tuple[int, int], channels: int, out: torch.Tensor | None
) -> torch.Tensor:
    """torchvision's decoder, or Pillow's where it can reduce. Both refuse the same files: a file that ends early."""
    scale = reduction(box, out_size, header.height * header.width)
    if scale > 1:
        return cut_reduced_jpeg(header.image or opened(data), scale, box, out_size, channels)
    bands = min(channels, header.plain_bands)
    mode = ImageReadMode.GRAY if bands == 1 else ImageReadMode.RGB
    try:
        # The bytearray is a copy, of 2 us; of bytes torch warns that they cannot be written. torchvision's own function
        # around this operator warns at every call that it will be removed.
        data_N = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        stored_CHW = torch.ops.image.decode_jpeg(data_N, mode.value, False)
    except (RuntimeError, AttributeError):  # one file in a thousand damaged ones, or a torchvision without decoders
        return cut_any(header.image or opened(data), box, out_size, channels)
    return resized(cropped(stored_CHW, box), out_size, out if bands == channels else None)


def reduction(box: Box, out_size: tuple[int, int], stored_pixels: int) -> int:
    """The largest of 1, 2, 4, 8 by which a box can be reduced and still have the pixels asked for."""
    ratio = min(box.height / out_size[0], box.width / out_size[1])
    scales = (8, 4, 2) if stored_pixels >= HALVED_PIXELS else (8, 4)
    return next((scale for scale in scales if ratio >= scale), 1)


def cut_reduced_jpeg(
    image: Image.Image, scale: int, box: Box, out_size: tuple[int, int], channels: int
) -> torch.Tensor:
    """From a picture decoded at 1/scale: the inverse DCT of fewer coefficients, a third of the time for large ones.

    A pixel of it stands for scale x scale stored ones, also at the last row and column, where there are fewer:
    coordinates are divided by scale, whatever the two sizes are.
    """
    image.draft("L" if channels == 1 else None, (image.width // scale, image.height // scale))
    left, top = box.left / scale, box.top / scale
    edges = (left, top, left + box.width / scale, top + box.height / scale)
    reduced = image.resize(out_size[::-1], Image.Resampling.BILINEAR, box=edges)
    return torch.tensor(pixels_of(reduced, channels)).permute(2, 0, 1)


def cut_any(image: Image.Image, box: Box, out_size: tuple[int, int], channels: int) -> torch.Tensor:
    """Pillow decodes. What depends on the values of all pixels is done before the cut, the rest after it, in strips
    of rows: conversions would hold several copies of a large picture."""
    image.load()
    if image.mode in WIDE_MODES:
        image = in_8_bits(image)
    pixels_HWC = np.empty((box.height, box.width, channels), np.uint8)
    for row in range(0, box.height, STRIP_ROWS):
        rows = min(STRIP_ROWS, box.height - row)
        strip = image.crop((box.left, box.top + row, box.left + box.width, box.top + row + rows))
        pixels_HWC[row : row + rows] = pixels_of(strip, channels)
    return resized(torch.from_numpy(pixels_HWC).permute(2, 0, 1), out_size)


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of a picture of any 8-bit mode."""
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = on_white(image.convert("RGBA"))
    if image.mode not in ("1", "L", "P", "RGB"):
        image = image.convert("RGB")  # CMYK and LAB have no direct way to grey
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


def in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating-point. Raises DataError where the range of the values is unknown."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):  # not: NaN is refused too
        raise DataError(
            f"an image of {image.mode} values from {low} to {high} has no known range",
            fix="save it as 8 or 16 bit, or as floating-point values from 0 to 1 or from 0 to 255",
        )
    if image.mode == "F":
        grey = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    else:
        grey = (values >> 8 if high > 255 else values).astype(np.uint8)
    if "transparency" in image.info:  # one value stands for it
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def cropped(image_CHW: torch.Tensor, box: Box) -> torch.Tensor:
    return image_CHW[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resized(image_CHW: torch.Tensor, out_size: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
    """Bilinear, antialiased: what torch's interpolate does, which cannot write into out (40 us less)."""
    if image_CHW.shape[1:] == out_size:
        return image_CHW if out is None else out.copy_(image_CHW)
    if out is None:
        return interpolate(image_CHW[None], size=out_size, mode="bilinear", antialias=True)[0]
    torch.ops.aten._upsample_bilinear2d_aa.out(image_CHW[None], out_size, False, None, None, out=out[None])
    return out
