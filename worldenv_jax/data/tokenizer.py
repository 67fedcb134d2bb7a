# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: the checkpoint's own `tokenizer.json`, or the small one shipped with this library."""

import functools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from worldenv_jax.types import Text

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "tokenizer.json"
# Ids of the shipped tokenizer.
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)


@functools.cache
def load_tokenizer(path: str | None = None) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Args:
        path: of the file; None: the shipped byte-level BPE (`assets/tokenizer.json`, at most 512 ids: 0 <pad>, 1 <s>,
            2 </s>, 3 <unk>, 4 <image>), which encodes any text.

    Raises: ValueError where the file does not exist.
    """
    path = SHIPPED if path is None else Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer file at {path}: pass the tokenizer.json of the checkpoint's own folder")
    return Tokenizer.from_file(str(path))


def pad_tokens(rows: list[list[int]], length: int, names: list[str]) -> Text:
    """Right-pads token ids to `length` with id 0: a Text of NumPy arrays [B, length].

    Args:
        names: what each row is called in the error.

    Raises: ValueError listing every row that is longer than `length`.
    """
    long = sorted({f"{name!r} has {len(row)} tokens" for row, name in zip(rows, names) if len(row) > length})
    if long:
        raise ValueError(f"text_length is {length}, but " + "; ".join(long) + ": raise text_length")
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Text(tokens, mask)
