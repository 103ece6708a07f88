"""From captions to numbers, by a tokenizer that is kept as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from models.base_model import ModelError

PAD = 0
KEPT = 200_000  # encoded captions


class Tokens:
    """Encodes captions, each of them once."""

    def __init__(self, tokenizer: str):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever loader processes are forked
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ModelError(
                "a model of captions needs the package tokenizers: pip install -e '.[multimodal]'"
            ) from None
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.size = self.tokenizer.get_vocab_size()
        self.length: int = json.loads(tokenizer)["padding"]["strategy"]["Fixed"]
        self.known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [B, L], padded with PAD; longer captions are cut."""
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        if len(self.known) + len(new) > KEPT:
            self.known.clear()
            new = list(dict.fromkeys(texts))
        self.known |= dict(zip(new, (encoded.ids for encoded in self.tokenizer.encode_batch(new))))
        return torch.tensor([self.known[text] for text in texts], dtype=torch.int64).reshape(len(texts), self.length)
