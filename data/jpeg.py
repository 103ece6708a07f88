"""The headers of plain JPEG files, read without Pillow: 10 us instead of 80 in a loader process."""

from __future__ import annotations

from typing import NamedTuple

START, END, SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
FRAMES = (0xC0, 0xC2)  # baseline and progressive
# Huffman and quantization tables, restart interval, comment, JFIF, colour profile, Photoshop's notes: the least length
# that is no damage to Pillow.
PASSED = {0xC4: 2, 0xDB: 2, 0xDD: 2, 0xFE: 2, 0xE0: 16, 0xE1: 2, 0xE2: 2, 0xED: 2}
TELLING = {0xE1: (b"Exif", b"http://ns.adobe.com/xap"), 0xE2: (b"MPF",)}  # how these begin that tell more than the size


class Frame(NamedTuple):
    height: int
    width: int
    bands: int  # 1 is grey, 3 is colour


def plain_frame(data: bytes) -> Frame | None:
    """None for what is no JPEG file, for a damaged one, and for one that says more than its size: a rotation, another
    colour model, several pictures. Pillow judges those."""
    place, frame = 2, None
    if data[:2] != START:
        return None
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker in FRAMES and frame is None:
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            bits, bands = data[place + 4], data[place + 9]
            if bits != 8 or bands not in (1, 3) or length != 8 + 3 * bands or not height * width:
                return None
            frame = Frame(height, width, bands)
        elif marker == SCAN:
            return frame if data.rfind(END) >= place + 2 + max(length, 2) else None
        elif length < PASSED.get(marker, 65536) or data.startswith(TELLING.get(marker, ()), place + 4):
            return None
        place += 2 + length
    return None
