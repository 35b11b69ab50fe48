"""Colour and words: Noto's emoji with their names, and captions as rows of word numbers (chapter 11).

The images are Google's Noto Emoji (Apache 2.0), the names those of Unicode's CLDR; ``emoji/NOTICE`` says from where.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files import SHIPPED_WEIGHTS

EMOJI_WEIGHTS = SHIPPED_WEIGHTS / "emoji"  # of a ``NoisePredictor`` whose classes are the words
EMOJI_FOLDER = Path(__file__).parent / "emoji"
EMOJI_SIZE = 32
MIN_COUNT = 2  # a word that fewer emoji have is left out of the vocabulary: it would be the name of one image


class Emoji(NamedTuple):
    """Images (N, 3, 32, 32) uint8 on white; of each its name and its group; the vocabulary of the words in them; and
    the captions (N, L) int64, filled up with the null label, ``len(vocabulary)``."""

    images: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    vocabulary: tuple[str, ...]
    captions: Tensor


def load_emoji() -> Emoji:
    """The 1,911 emoji that ship with the package. A caption is the words of the name and of the group that at least
    ``MIN_COUNT`` emoji have."""
    sheet = np.asarray(Image.open(EMOJI_FOLDER / "emoji.png").convert("RGB"))
    rows, columns = (length // EMOJI_SIZE for length in sheet.shape[:2])
    cells = sheet.reshape(rows, EMOJI_SIZE, columns, EMOJI_SIZE, 3).transpose(0, 2, 4, 1, 3)
    names, groups = zip(*json.loads((EMOJI_FOLDER / "names.json").read_text(encoding="utf-8")), strict=True)
    images = torch.from_numpy(cells.reshape(-1, 3, EMOJI_SIZE, EMOJI_SIZE)[: len(names)].copy())
    texts = [f"{name} {group}" for name, group in zip(names, groups, strict=True)]
    vocabulary = vocabulary_of(texts)
    return Emoji(images, names, groups, vocabulary, _rows([words_of(text) for text in texts], vocabulary))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, each once, in their order: "Cat face, cat" → cat, face."""
    return list(dict.fromkeys(re.findall(r"[^\W_]+", text.lower())))


def vocabulary_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The words that at least ``MIN_COUNT`` of the texts have, in the order of the alphabet."""
    counts = Counter(word for text in texts for word in words_of(text))
    return tuple(sorted(word for word, count in counts.items() if count >= MIN_COUNT))


def captions_of(texts: Sequence[str], vocabulary: Sequence[str]) -> Tensor:
    """Texts as captions (B, L) int64 for a network whose classes are the words of this vocabulary, filled up with the
    null label; "" is no word at all. ValueError for one text in place of a list, and for a word that is not in the
    vocabulary: it names the nearest ones that are."""
    if isinstance(texts, str):  # a text is a sequence of texts, too
        raise ValueError(f"texts must be a list of them, got one: {texts!r}")
    known = set(vocabulary)
    for word in (word for text in texts for word in words_of(text)):
        if word not in known:
            near = ", ".join(difflib.get_close_matches(word, vocabulary)) or "none"
            raise ValueError(f"{word!r} is not one of the {len(known)} words known; near ones: {near}")
    return _rows([words_of(text) for text in texts], vocabulary)


def _rows(texts: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Tensor:
    """The words of each text that are in the vocabulary, as a row of their numbers."""
    numbers = {word: number for number, word in enumerate(vocabulary)}
    found = [[numbers[word] for word in words if word in numbers] for words in texts]
    longest = max([1, *map(len, found)])
    rows = [row + [len(numbers)] * (longest - len(row)) for row in found]
    return torch.tensor(rows, dtype=torch.long).view(-1, longest)
