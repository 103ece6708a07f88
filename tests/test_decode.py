"""Decoding: reference values for every mode, orientations, cuts, bad files one by one, memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from torchvision.transforms.v2 import functional as tv

import data.decode
from configs.errors import DataError
from data.decode import channels_of, crop_resized, decode
from data.geometry import Box, Geometry
from data.jpeg import Frame, plain_frame
from tests.conftest import ROOT


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + generator.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels(array) -> torch.Tensor:
    """uint8 [C, H, W] of [H, W] or [H, W, C]."""
    array = np.array(array, np.uint8)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.dtype == other.dtype == torch.uint8
    assert one.shape == other.shape
    return float((one.int() - other.int()).abs().max())


def cut(box: Box, out_height: int, out_width: int):
    return lambda height, width: (box, (out_height, out_width))


RGB = photograph(40, 56)
VALUES = np.asarray(RGB)
GREY = VALUES[..., 1]
ALPHA = np.tile(np.linspace(0, 255, 56).round().astype(np.uint8), (40, 1))
RAMP = (np.arange(40 * 56).reshape(40, 56) * 29).astype(np.uint16)


def on_white(values: np.ndarray) -> np.ndarray:
    """value * alpha + 255 * (1 - alpha), for the last axis."""
    alpha = ALPHA.astype(float) / 255
    alpha = alpha[..., None] if values.ndim == 3 else alpha
    return np.rint(values * alpha + 255 * (1 - alpha))


def luma(values: np.ndarray) -> np.ndarray:
    """ITU-R 601, as Pillow and libjpeg compute grey."""
    return np.rint(values @ np.array([0.299, 0.587, 0.114]))


def from_ycbcr(values: np.ndarray) -> np.ndarray:
    """ITU-R 601 at full range, as in JPEG."""
    y, cb, cr = (values[..., band].astype(float) - shift for band, shift in ((0, 0), (1, 128), (2, 128)))
    return np.rint(np.dstack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])).clip(0, 255)


def palette(transparency: bytes | int | None) -> tuple[bytes, int, np.ndarray]:
    """A picture of four colours, of which the first is invisible where transparency is given."""
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    places = (np.arange(40 * 56).reshape(40, 56) // 7) % 4
    image = Image.fromarray(places.astype(np.uint8)).convert("P")
    image.putpalette(colours.flatten().tolist())
    shown = colours.copy()
    if transparency is not None:
        shown[0] = 255
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(image, "PNG", **options), 3, shown[places]


def animation(file_format: str) -> bytes:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=20, lossless=True)


def corpus() -> dict[str, tuple[bytes, int, np.ndarray]]:
    """By kind: the file, its channels, the pixels it stands for."""
    colours, grey, ramp = VALUES, GREY, RAMP
    rgba = Image.fromarray(np.dstack([VALUES, ALPHA]))
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    bits = GREY > 127
    cmyk = RGB.convert("CMYK")
    grey_l, half = Image.new("L", (56, 40), 128), Image.new("L", (56, 40), 128)  # L* 50.2, a* and b* 0
    first = np.full((6, 8, 3), (250, 0, 0))
    noisy = np.where(ramp == ramp[3, 3], 255, ramp >> 8)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    return {
        "1": (encoded(Image.fromarray(bits), "PNG"), 1, bits * 255),
        "L": (encoded(Image.fromarray(GREY), "PNG"), 1, GREY),
        "LA": (encoded(grey_alpha, "PNG"), 1, on_white(GREY)),
        "L and a transparent value": (
            encoded(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0])),
            1,
            np.where(grey == grey[0, 0], 255, grey),
        ),
        "P": palette(None),
        "P and a transparent colour": palette(0),
        "P and alpha": palette(b"\x00\xff\xff\xff"),
        "RGB": (encoded(RGB, "PNG"), 3, VALUES),
        "RGB and a transparent colour": (
            encoded(RGB, "PNG", transparency=tuple(VALUES[0, 0].tolist())),
            3,
            np.where((colours == colours[0, 0]).all(2, keepdims=True), 255, colours),
        ),
        "RGBA": (encoded(rgba, "PNG"), 3, on_white(VALUES)),
        "RGBA in WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), 3, on_white(VALUES)),
        "RGB in BMP": (encoded(RGB, "BMP"), 3, VALUES),
        "RGB in PPM": (encoded(RGB, "PPM"), 3, VALUES),
        "16 bits": (encoded(Image.fromarray(RAMP), "PNG"), 1, RAMP >> 8),
        "16 bits, big-endian": (encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"), 1, RAMP >> 8),
        "16 bits, all small": (encoded(Image.fromarray(RAMP % 256), "PNG"), 1, RAMP % 256),
        "16 bits and a transparent value": (
            encoded(Image.fromarray(RAMP), "PNG", transparency=int(RAMP[3, 3])),
            1,
            noisy,
        ),
        "32 bits": (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), 1, RAMP >> 8),
        "float 0..1": (encoded(Image.fromarray((ALPHA / 255).astype(np.float32)), "TIFF"), 1, ALPHA),
        "float 0..255": (encoded(Image.fromarray(GREY + np.float32(0.25)), "TIFF"), 1, GREY),
        "CMYK in TIFF": (encoded(cmyk, "TIFF"), 3, VALUES),
        "CMYK in JPEG": (encoded(Image.new("CMYK", (8, 6), (0, 255, 255, 5)), "JPEG"), 3, first),
        "LAB": (encoded(Image.merge("LAB", [grey_l, half, half]), "TIFF"), 3, np.full((40, 56, 3), 119)),
        "YCbCr in TIFF": (encoded(RGB.convert("YCbCr"), "TIFF"), 3, from_ycbcr(np.asarray(RGB.convert("YCbCr")))),
        "ICC profile, ignored": (encoded(RGB, "PNG", icc_profile=icc), 3, VALUES),
        "JPEG": (encoded(Image.new("RGB", (8, 6), (250, 0, 0)), "JPEG", quality=100, subsampling=0), 3, first),
        "grey JPEG": (encoded(Image.new("L", (8, 6), 99), "JPEG", quality=100), 1, np.full((6, 8), 99)),
        "animated GIF": (animation("GIF"), 3, first),
        "animated WebP": (animation("WEBP"), 3, first),
        "animated PNG": (animation("PNG"), 3, first),
        "1x1": (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), 3, np.array([[[1, 2, 3]]])),
        "65535x1": (encoded(Image.new("RGB", (65535, 1), (1, 2, 3)), "PNG"), 3, np.full((1, 65535, 3), (1, 2, 3))),
        "1x65500": (encoded(Image.new("L", (1, 65500), 9), "JPEG"), 1, np.full((65500, 1), 9)),
    }


CORPUS = corpus()


@pytest.mark.parametrize("kind", CORPUS)
def test_every_kind_of_picture_has_the_pixels_it_stands_for(kind):
    file, channels, values = CORPUS[kind]
    expected = pixels(values)
    assert channels_of(file, kind) == channels
    image = decode(file, kind, channels)
    assert image.is_contiguous()
    assert difference(image, expected) <= 2
    if channels == 1:
        assert difference(decode(file, kind, 3), expected.expand(3, -1, -1)) <= 2
    else:
        assert difference(decode(file, kind, 1), pixels(luma(values))) <= 3
    height, width = expected.shape[1:]
    box = Box(height // 3, width // 4, max(1, height // 2), max(1, width // 2))
    part = decode(file, kind, channels, cut(box, *box[2:]))  # the same values, whatever lies in the cut
    assert torch.equal(part, crop_resized(image, cut(box, *box[2:])))


def test_avif_is_read():
    file = encoded(Image.new("RGB", (20, 10), (200, 100, 0)), "AVIF", quality=100)
    assert difference(decode(file, "x", 3), pixels(np.full((10, 20, 3), (200, 100, 0)))) <= 4


def test_a_large_picture_is_converted_in_strips():
    image = photograph(600, 20)
    assert torch.equal(decode(encoded(image, "PNG"), "x", 3), pixels(image))
    plan = cut(Box(100, 2, 450, 15), 30, 10)
    expected = tv.resize(pixels(image)[:, 100:550, 2:17], [30, 10], antialias=True)
    assert torch.equal(decode(encoded(image, "PNG"), "x", 3, plan), expected)


@pytest.mark.parametrize("range_of_values", [(-1.0, 1.0), (0.0, 256.0), (0.0, np.nan), (0.0, np.inf)])
def test_floating_point_values_of_unknown_range_are_refused_by_name(range_of_values):
    file = encoded(Image.fromarray(np.array([range_of_values], np.float32)), "TIFF")
    with pytest.raises(DataError, match="F values from .* has no known range") as error:
        decode(file, "depth.tif", 3)
    assert error.value.where == "depth.tif"
    assert error.value.fix


@pytest.mark.parametrize("range_of_values", [(-1, 5), (0, 65536)])
def test_integers_of_unknown_range_are_refused_by_name(range_of_values):
    file = encoded(Image.fromarray(np.array([range_of_values], np.int32)), "TIFF")
    with pytest.raises(DataError, match="I values from .* has no known range"):
        decode(file, "x", 3)


def test_a_cut_of_small_16_bit_values_is_scaled_like_the_whole():
    wide = np.array([[5, 200, 60000, 60000]], np.uint16)
    file = encoded(Image.fromarray(wide), "PNG")
    assert decode(file, "x", 1, cut(Box(0, 0, 1, 2), 1, 2)).tolist() == [[[0, 0]]]


def exif_of(orientation: int) -> bytes:
    """Holds also a resolution of 72/0, on which readers have stumbled."""
    entries = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, orientation, 0x011A, 5, 1, 38)
    return b"Exif\0\0II*\0\x08\0\0\0" + entries + struct.pack("<III", 0, 72, 0)


def oriented(orientation: int, file_format: str) -> bytes:
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    return encoded(photograph(91, 122), file_format, exif=exif_of(orientation), **options)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_boxes_lie_in_the_upright_picture(orientation, file_format):
    file = oriented(orientation, file_format)
    upright = decode(file, "x", 3)
    with Image.open(io.BytesIO(oriented(1, file_format))) as stored:
        turned = stored.convert("RGB")
    turned.getexif()[0x0112] = orientation
    assert torch.equal(upright, pixels(ImageOps.exif_transpose(turned)))
    assert upright.shape[1:] == ((122, 91) if orientation > 4 else (91, 122))
    box = Box(11, 23, 60, 50)
    plan = cut(box, 45, 40)
    assert difference(decode(file, "x", 3, plan), crop_resized(upright, plan)) <= 1
    reduced = cut(box, 25, 21)
    apart = (decode(file, "x", 3, reduced).float() - crop_resized(upright, reduced).float()).abs().mean()
    assert apart < (3 if file_format == "JPEG" else 0.5)


def test_damaged_metadata_do_not_matter():
    expected = decode(encoded(RGB, "JPEG"), "x", 3)
    for exif in (b"Exif\0\0II*\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0", exif_of(1)[:30]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(decode(encoded(RGB, "JPEG", exif=exif), "x", 3), expected)
    assert torch.equal(decode(encoded(RGB, "JPEG", exif=exif_of(9)), "x", 3), expected)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(481, 643), (480, 640), (487, 645)])
def test_a_reduced_jpeg_shows_the_same_as_a_full_one(size, channels, scale, monkeypatch):
    monkeypatch.setattr(data.decode, "HALVED_PIXELS", 0)
    file = encoded(photograph(*size), "JPEG", quality=90)
    for box in (Box(37, 51, 400, 500), Box(size[0] - 321, size[1] - 401, 321, 401), Box(0, 0, *size)):
        out_size = (box.height // scale - 1, box.width // scale - 1)
        assert data.decode.reduction(box, out_size, size[0] * size[1]) == scale
        plan = cut(box, *out_size)
        full, reduced = crop_resized(decode(file, "x", channels), plan), decode(file, "x", channels, plan)
        apart = (full.float() - reduced.float()).abs()
        assert apart.mean() < 0.8
        assert apart.max() < 12


def test_small_jpegs_are_reduced_by_4_and_8_alone():
    def scale(ratio: int, pixels: int) -> int:
        return data.decode.reduction(Box(0, 0, 10 * ratio, 10 * ratio), (10, 10), pixels)

    assert [scale(ratio, 499_999) for ratio in (1, 2, 3, 4, 8, 9)] == [1, 1, 1, 4, 8, 8]
    assert [scale(ratio, 500_000) for ratio in (1, 2, 3, 4, 8, 9)] == [1, 2, 2, 4, 8, 8]


JPEG = encoded(photograph(60, 80), "JPEG", comment=b"two words")
CMYK = encoded(photograph(60, 80).convert("CMYK"), "JPEG")
PLAIN_JPEGS = {
    "baseline": JPEG,
    "progressive": encoded(photograph(60, 80), "JPEG", progressive=True),
    "grey": encoded(photograph(60, 80).convert("L"), "JPEG"),
    "restart intervals": encoded(photograph(60, 80), "JPEG", restart_marker_blocks=3, optimize=True),
    "without JFIF": JPEG[:2] + JPEG[20:],
    "colour profile": encoded(photograph(60, 80), "JPEG", icc_profile=b"profile" * 20_000),
    "Photoshop": JPEG[:20] + b"\xff\xed\0\x1cPhotoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\0" + JPEG[20:],
}
OTHER_JPEGS = {
    "rotated": encoded(photograph(60, 80), "JPEG", exif=exif_of(6)),
    "rotated by XMP": encoded(photograph(60, 80), "JPEG", xmp=b'<x tiff:Orientation="6"/>'),
    "CMYK": CMYK,
    "CMYK without Adobe's segment": CMYK[: CMYK.index(b"\xff\xee")] + CMYK[CMYK.index(b"\xff\xee") + 16 :],
    "several pictures": encoded(photograph(60, 80), "MPO", save_all=True, append_images=[photograph(60, 80, seed=1)]),
    "bytes between segments": JPEG[:20] + b"\xff" + JPEG[20:],
    "a short JFIF segment": JPEG[:2] + b"\xff\xe0\0\x06JFIF" + JPEG[20:],
}


@pytest.mark.parametrize("kind", PLAIN_JPEGS)
def test_the_header_of_a_plain_jpeg_is_read_without_pillow(kind, monkeypatch):
    assert plain_frame(PLAIN_JPEGS[kind]) == Frame(60, 80, 1 if kind == "grey" else 3)
    assert plain_frame(PLAIN_JPEGS[kind][:-2]) is None  # its end is missing
    monkeypatch.setattr(data.decode, "opened", None)
    decode(PLAIN_JPEGS[kind], "x", 3)


@pytest.mark.parametrize("kind", OTHER_JPEGS)
def test_pillow_judges_any_other_jpeg(kind):
    assert plain_frame(OTHER_JPEGS[kind]) is None


@pytest.mark.filterwarnings("ignore:.*(EXIF|Tag data|MPO)")
def test_jpegs_are_judged_as_by_pillow_and_have_the_same_pixels(monkeypatch, capfd):
    """Sound ones, and ones with damaged headers."""
    generator = np.random.default_rng(0)
    sound = [*PLAIN_JPEGS.values(), *OTHER_JPEGS.values()]
    files, plain = list(sound), 0
    for number in range(400):
        file = sound[number % len(sound)]
        damaged = bytearray(file)
        places = [place for place in range(2, file.index(b"\xff\xda") + 14) if number % 3 or file[place] == 0xFF]
        damaged[generator.choice(places) + generator.integers(4)] = generator.choice(
            [0, 1, 3, 8, 0xC0, 0xDA, 0xE0, 0xFF]
        )
        files.append(bytes(damaged))
    for file in files:
        plain += plain_frame(file) is not None
        one = pixels_or_refusal(file)
        with monkeypatch.context() as patch:
            patch.setattr(data.decode, "plain_frame", lambda data: None)
            other = pixels_or_refusal(file)
        assert one is other is None or torch.equal(one, other)
    assert 80 < plain < 320
    capfd.readouterr()


def pixels_or_refusal(file: bytes) -> torch.Tensor | None:
    try:
        return decode(file, "x", 3)
    except DataError:
        return None


@pytest.mark.parametrize("kind", ["RGB", "L", "JPEG", "grey JPEG", "CMYK in JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_written_to_a_given_place(kind, channels):
    file, height, width = CORPUS[kind][0], *CORPUS[kind][2].shape[:2]
    for plan in (cut(Box(1, 2, height - 2, width - 3), 9, 11), cut(Box(0, 0, height, width), height, width)):
        expected = decode(file, "x", channels, plan)
        batch = torch.full((3, *expected.shape), 77, dtype=torch.uint8)
        assert decode(file, "x", channels, plan, out=batch[1]).data_ptr() == batch[1].data_ptr()
        assert torch.equal(batch[1], expected)
        assert torch.equal(crop_resized(decode(file, "x", channels), plan, out=batch[1].fill_(0)), batch[1])
        assert difference(batch[1], expected) <= 1
        assert (batch[::2] == 77).all()


def test_without_torchvisions_decoder_the_pixels_are_the_same(monkeypatch):
    plan = Geometry("random", 30).plan(3)
    expected = decode(encoded(RGB, "JPEG"), "x", 3, plan)
    monkeypatch.setattr(torch.ops, "image", object())
    assert torch.equal(decode(encoded(RGB, "JPEG"), "x", 3, plan), expected)


def test_pixels_in_memory_are_cut_as_torchvision_does_it():
    image = pixels(photograph(70, 90)).contiguous()
    plan = cut(Box(5, 8, 50, 61), 32, 40)
    expected = tv.resize(tv.crop(image, 5, 8, 50, 61), [32, 40], antialias=True)
    assert torch.equal(crop_resized(image, plan), expected)
    assert torch.equal(decode(encoded(Image.fromarray(image.permute(1, 2, 0).numpy()), "PNG"), "x", 3, plan), expected)
    part = crop_resized(image, cut(Box(5, 8, 50, 61), 50, 61))
    assert torch.equal(part, image[:, 5:55, 8:69])
    assert part.is_contiguous()
    assert crop_resized(image, cut(Box(0, 0, 70, 90), 70, 90)).data_ptr() == image.data_ptr()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int, size: int = 1_000_000, bits: int = 8, kind: int = 2) -> bytes:
    """A black PNG that promises so many pixels, and holds size bytes; kind 0 is grey, 2 RGB."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = zlib.compress(bytes(size), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    file = bytearray(encoded(photograph(64, 64).convert(mode), "JPEG", **options))
    start = next(place for place in range(len(file)) if file[place] == 0xFF and file[place + 1] in (0xC0, 0xC2))
    file[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(file)


def bad_files() -> dict[str, bytes]:
    jpeg = encoded(photograph(300, 400), "JPEG", quality=90)
    progressive = encoded(photograph(300, 400), "JPEG", quality=90, progressive=True)
    thumbnail = encoded(photograph(20, 20), "JPEG")
    with_thumbnail = encoded(photograph(300, 400), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)
    png = encoded(RGB, "PNG")
    bad_crc = bytearray(png)
    bad_crc[png.index(b"IHDR") + 14] ^= 1
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 16
    files = {
        "empty": b"",
        "text": b"a dog, in words",
        "html": b"<!DOCTYPE html><html>not found</html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "eps": encoded(RGB, "EPS"),
        "pdf": encoded(RGB, "PDF"),
        "ico": encoded(RGB, "ICO"),
        "zeros": bytes(5000),
        "bad checksum in a PNG header": bytes(bad_crc),
        "a flipped bit in a PNG": bytes(flipped),
        "PNG without pixels": png_of_size(0, 5),
        "PNG with too few rows": png_of_size(3000, 3000),
        "JPEG with too few rows": jpeg_of_size(64, 2000)[:-2],
        "PNG 65535x65535": png_of_size(65535, 65535),
        "PNG 30000x30000": png_of_size(30000, 30000),
        "PNG 12000x12000": png_of_size(12000, 12000),
        "JPEG 65535x65535": jpeg_of_size(65500, 65500),
        "JPEG 12000x9000": jpeg_of_size(12000, 9000),
        "progressive JPEG 12000x9000": jpeg_of_size(12000, 9000, progressive=True),
        "JPEG without its last byte": jpeg[:-1],
        "JPEG with a thumbnail, half": with_thumbnail[: len(with_thumbnail) // 2],
        "progressive JPEG, two thirds": progressive[: len(progressive) * 2 // 3],
        "JPEG header alone": jpeg[:300],
        "PNG, its second half zeros": png[: len(png) // 2] + bytes(len(png) // 2),
        "JPEG, its second half zeros": jpeg[: len(jpeg) // 2] + bytes(len(jpeg)),
        "JPEG with a thumbnail, its end zeros": with_thumbnail[:-500] + bytes(5000),
        "progressive JPEG, its end zeros": progressive[:-500] + bytes(5000),
    }
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        file = encoded(photograph(100, 100), file_format)
        files |= {f"{file_format}, {share:.0%} of it": file[: int(len(file) * share)] for share in (0.1, 0.5, 0.95)}
    return files


BAD_FILES = bad_files()


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated|Tag data)")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest takes our own filter away
def test_a_bad_file_is_refused_by_name_for_every_cut(kind):
    plans = [None] + [cut(Box(0, 0, 16, 16), side, side) for side in (16, 8, 4, 2)]
    for channels in (1, 3):
        for plan in plans:
            with pytest.raises(DataError) as error:
                decode(BAD_FILES[kind], f"{kind}.png", channels, plan)
            assert error.value.where == f"{kind}.png"
            assert error.value.fix
            assert "object at 0x" not in error.value.what


@pytest.mark.parametrize(
    ("fits", "exceeds"),
    [
        (jpeg_of_size(8200, 6200), jpeg_of_size(8500, 6300)),
        (jpeg_of_size(7000, 5500, "CMYK"), jpeg_of_size(7000, 5800, "CMYK")),
        (png_of_size(6200, 6200), png_of_size(6400, 6400)),
        (png_of_size(5400, 5400, bits=16, kind=0), png_of_size(5500, 5500, bits=16, kind=0)),
    ],
)
def test_the_limit_of_pixels_is_lower_where_a_pixel_costs_more_memory(fits, exceeds):
    channels_of(fits, "x")
    with pytest.raises(DataError, match="too large") as error:
        channels_of(exceeds, "x")
    assert "megapixels" in error.value.fix


def test_damaged_jpegs_are_refused_for_every_cut_or_for_none(capfd):
    """Flipped bytes: what decodes does so at each scale and for each number of channels."""
    generator = np.random.default_rng(0)
    file = encoded(photograph(60, 80), "JPEG", quality=70)
    plans = [None] + [cut(Box(0, 0, 16, 16), side, side) for side in (8, 4, 2)]
    refused = 0
    for _ in range(300):
        damaged = bytearray(file)
        for place in generator.integers(2, len(file), 3):
            damaged[place] = generator.integers(256)
        bad = [is_refused(bytes(damaged), channels, plan) for channels in (1, 3) for plan in plans]
        assert len(set(bad)) == 1
        refused += bad[0]
    assert 30 < refused < 270
    capfd.readouterr()


def is_refused(file: bytes, channels: int, plan) -> bool:
    try:
        decode(file, "x", channels, plan)
    except DataError:
        return True
    return False


def test_a_fault_of_the_plan_is_not_blamed_on_the_file():
    def wrong(height: int, width: int):
        raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        decode(encoded(RGB, "PNG"), "x", 3, wrong)


MEMORY = """
import pickle, resource, sys
from configs.errors import DataError
from data.decode import decode
from PIL import Image
Image.init()
good, hostile = pickle.load(sys.stdin.buffer)
decode(good, "x", 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shapes = []
for file in hostile:
    try:
        shapes.append(tuple(decode(file, "x", 3).shape))
    except DataError:
        shapes.append(None)
print(shapes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6, sep="\\n")
"""


def test_hostile_headers_cost_no_memory_and_print_nothing():
    import pickle

    hostile = [file for kind, file in BAD_FILES.items() if "000" in kind or "655" in kind or "rows" in kind]
    large = Image.new("RGB", (8200, 6200), (9, 99, 199))  # 51 megapixels
    allowed = [encoded(large, "JPEG"), png_of_size(6200, 6200, 6200 * (3 * 6200 + 1))]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        input=pickle.dumps((encoded(RGB, "JPEG"), [*hostile, *allowed])),
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    shapes, growth_megabytes = done.stdout.decode().splitlines()
    assert eval(shapes) == [None] * len(hostile) + [(3, 6200, 8200), (3, 6200, 6200)]
    assert float(growth_megabytes) < 500
