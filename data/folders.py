"""Image folders: one subfolder a class, annotations of boxes, or a file of captions."""

from __future__ import annotations

from pathlib import Path

from configs.errors import DataError
from data.box_folders import BoxFolder, layout
from data.captioned_folder import FILES, CaptionedFolder
from data.labels import Labels
from data.sources import FolderSource, Source


def open_folder(root: Path, channels: int | None = None, like: Labels | None = None, part: str = "train") -> Source:
    """The images of a folder with what is learnt of them. like: the labels of the training folder."""
    captions = next((root / name for name in FILES if (root / name).is_file()), None)
    found = "captions" if captions else "boxes" if layout(root) else "classes"
    if like is not None and like.name != found:
        raise DataError(f"the folder has {found}, and {like.name} are to be learnt", where=str(root))
    if captions:
        return CaptionedFolder(root, captions, channels, like)
    classes = like.classes if like else None
    return BoxFolder(root, channels, classes, part) if layout(root) else FolderSource(root, channels, classes)
