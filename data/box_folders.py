"""Folders of images with boxes: COCO's JSON beside the images, or Pascal VOC's three folders."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from configs.errors import DataError
from data.boxes import BoxLabels
from data.sources import FileSource, channels_of_first

COCO_NAMES = ("_annotations.coco.json", "annotations.json", "instances*.json", "annotations/instances*.json")
VOC_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


def layout(root: Path) -> str | None:
    """`coco` or `voc` for a folder that has boxes; None for any other."""
    if (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir():
        return "voc"
    return "coco" if coco_file(root) else None


class BoxFolder(FileSource):
    """The images of such a folder. part: which of VOC's lists of images, where the folder has one for it."""

    def __init__(self, root: Path, channels: int | None = None, classes: list[str] | None = None, part: str = "train"):
        read = read_voc if layout(root) == "voc" else read_coco
        self.paths, found, annotated = read(root, part)
        if not self.paths:
            raise DataError("no images are listed", where=str(root))
        self.root, self.origin = root, str(root.absolute())
        kind = BoxLabels(classes or found)
        numbers = {name: number for number, name in enumerate(kind.classes)}
        labels = np.empty(len(annotated), object)
        labels[:] = [
            kind.boxes([box for box, _ in some], [numbers.get(name, name) for _, name in some], width, height)
            for some, width, height in annotated
        ]
        self.kind, self.labels = kind, labels
        self.channels = channels or channels_of_first(self, range(len(self.paths)))


Annotated = tuple[list[tuple[Sequence[float], str]], float, float]  # boxes xywh with their classes; width and height
Found = tuple[list[Path], list[str], list[Annotated]]  # images, class names, what is on each image


def coco_file(root: Path) -> Path | None:
    found = [file for name in COCO_NAMES for file in sorted(root.glob(name))]
    if len(found) > 1:
        raise DataError(
            f"several files of annotations: {', '.join(file.name for file in found[:3])}",
            where=str(root),
            fix="keep one beside the images of each split",
        )
    return found[0] if found else None


def read_coco(root: Path, part: str) -> Found:
    """Boxes of crowds are left out. The classes are in the order of their ids."""
    file = coco_file(root)
    assert file is not None
    try:
        table = json.loads(file.read_text())
        categories = {one["id"]: one["name"] for one in sorted(table["categories"], key=lambda one: one["id"])}
        boxes: dict[Any, list[tuple[Sequence[float], str]]] = defaultdict(list)
        for one in table["annotations"]:
            if not one.get("iscrowd"):
                category = categories.get(one["category_id"], f"id {one['category_id']}")
                boxes[one["image_id"]].append((sides_of(one), category))
        images = sorted(table["images"], key=lambda one: one["id"])
        annotated = [(boxes[one["id"]], *size_of(one.get("width"), one.get("height"))) for one in images]
        names = [str(Path(one["file_name"])) for one in images]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"this is no COCO JSON of instances: {error!r}", where=str(file)) from None
    inner = root / "images"
    found = ((root / name).is_file() for name in names)
    base = inner if not any(found) and any((inner / name).is_file() for name in names) else root
    return [base / name for name in names], list(dict.fromkeys(categories.values())), annotated


def sides_of(annotation: dict[str, Any]) -> list[float]:
    """x, y, width, height in pixels."""
    if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
        raise ValueError(f"annotation {annotation.get('id')} has the bbox {annotation['bbox']!r:.60}")
    return [float(side) for side in annotation["bbox"]]


def read_voc(root: Path, part: str) -> Found:
    """VOC counts pixels from 1, and a box holds its last ones. The classes are in the order of their names."""
    listed = voc_list(root, part) or voc_list(root, "train")
    if listed is not None:
        stems = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        files = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    else:
        files = sorted((root / "Annotations").glob("*.xml"))
    paths: list[Path] = []
    annotated: list[Annotated] = []
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
            paths.append(root / "JPEGImages" / (tree.findtext("filename") or f"{file.stem}.jpg"))
            width, height = size_of(tree.findtext("size/width"), tree.findtext("size/height"))
            annotated.append(([voc_box(found) for found in tree.iter("object")], width, height))
        except (ElementTree.ParseError, TypeError, ValueError, OSError) as error:
            raise DataError(f"this is no annotation of Pascal VOC: {error}", where=str(file)) from None
    return paths, sorted({name for some, _, _ in annotated for _, name in some}), annotated


def voc_list(root: Path, part: str) -> Path | None:
    files = [root / "ImageSets" / "Main" / f"{name}.txt" for name in VOC_SPLITS[part]]
    return next((file for file in files if file.is_file()), None)


def voc_box(found: ElementTree.Element) -> tuple[list[float], str]:
    left, top, right, bottom = (float(found.findtext(f"bndbox/{side}") or "nan") for side in SIDES)
    return [left - 1, top - 1, right - left + 1, bottom - top + 1], found.findtext("name") or ""


SIDES = ("xmin", "ymin", "xmax", "ymax")


def size_of(width: Any, height: Any) -> tuple[float, float]:
    """Without limits where the annotation does not tell."""
    return float(width or 0) or np.inf, float(height or 0) or np.inf


def has_part(root: Path, part: str) -> bool:
    """Whether the folder lists the images of this split as well."""
    return layout(root) == "voc" and voc_list(root, part) is not None
