"""Captions: one or several texts an image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from configs.dataset_info import DatasetInfo
from configs.errors import ConfigError, DataError
from configs.options import Config
from data.columns import array_of, chosen_column
from data.labels import Cells, Column

NAMES = ("caption", "captions", "text", "texts", "sentence", "sentences")
VOCABULARY, LONGEST = 8192, 64  # tokens at most: of all captions, of one


class CaptionLabels:
    """A tuple of strings an image; an empty one where there is none. Objects [N].

    tokenizer: JSON, learnt from the captions of the train split as it comes, or of its first rows where a stream
    tells no more.
    """

    name = "captions"
    blank = ("",)

    def __init__(self, labels: Iterable[tuple[str, ...]], columns: tuple[str, ...] = ()):
        self.classes: list[str] = []
        self.columns = columns
        self.model_args = {"tokenizer": learn_tokenizer(text for texts in labels for text in texts)}

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        marked = {"label", "labels", "class", "target", "cls"} & features.keys()
        return not marked and bool(caption_columns(features))

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        wanted = config.label_column or info.label_column
        found = chosen_column(dict(features), wanted, caption_columns(features), "label", title)
        if not holds_text(features[found]):
            raise DataError(
                f"column {found!r} holds {features[found]}, no captions", where=title, fix="--label_column NAME"
            )
        return cls([] if column is None else map(texts_of, column(found)), (found,))

    def learn(self, labels: Iterable[tuple[str, ...]]) -> None:
        """Take the words from the first rows of a stream."""
        self.model_args = {"tokenizer": learn_tokenizer(text for texts in labels for text in texts)}

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        return as_labels(map(texts_of, cells[self.columns[0]]))

    def fault(self, label: Any) -> str:
        return "" if label else "it has no caption"

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.array([place for place, label in enumerate(labels) if not label], np.int64)

    def check(self, labels: np.ndarray, title: str) -> None:
        if len({text for texts in labels for text in texts}) < 2:
            raise DataError(
                "all images have the same caption", where=title, fix="name another column with --label_column"
            )

    def strata(self, labels: np.ndarray) -> np.ndarray:
        return np.zeros(len(labels), np.int64)

    def counts(self, labels: np.ndarray) -> np.ndarray:
        return np.zeros(0, np.int64)

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        """captions: a tuple of strings for each of B images."""
        return {"captions": list(labels)}

    def __str__(self) -> str:
        return "captions"


def caption_columns(features: Mapping[str, Any]) -> list[str]:
    return [name for name in NAMES if name in features and holds_text(features[name])]


def holds_text(feature: Any) -> bool:
    """Whether a column holds strings, or lists of them."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def texts_of(cell: Any) -> tuple[str, ...]:
    """A string or a list of strings; what is empty or no text is left out."""
    texts = [cell] if isinstance(cell, str) else cell if isinstance(cell, (list, tuple, np.ndarray)) else []
    whole = (text.encode("utf-8", "replace").decode() for text in texts if isinstance(text, str))  # no half characters
    return tuple(text.strip() for text in whole if text.strip())


def as_labels(captions: Iterable[tuple[str, ...]]) -> np.ndarray:
    """Objects [N]."""
    found = list(captions)
    return array_of(found) if found else np.empty(0, object)


def learn_tokenizer(texts: Iterable[str]) -> str:
    """Pieces of words by how often they come (byte-level BPE, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909,
    lower case), as JSON; the same from the same texts. Encodings end with [EOS], and are all as long as the longest."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever loader processes are forked
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    except ImportError:
        raise ConfigError("captions need the package tokenizers", fix="pip install -e '.[multimodal]'") from None
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["[PAD]", "[EOS]"], initial_alphabet=letters, show_progress=False
        ),
    )
    end = tokenizer.token_to_id("[EOS]")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", end)])
    longest = max((len(encoded.ids) for encoded in tokenizer.encode_batch(texts)), default=LONGEST)
    tokenizer.enable_truncation(min(longest, LONGEST))
    tokenizer.enable_padding(length=min(longest, LONGEST), pad_id=0, pad_token="[PAD]")
    return tokenizer.to_str()
