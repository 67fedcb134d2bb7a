# SPDX-License-Identifier: Apache-2.0
"""The shipped tokenizer and padding."""

import numpy as np
import pytest

from worldenv_jax.data.tokenizer import BOS, EOS, IMAGE, PAD, UNKNOWN, load_tokenizer, pad_tokens


def test_special_tokens_and_size():
    tokenizer = load_tokenizer()
    assert tokenizer.get_vocab_size() <= 512
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "</s>", "<unk>", "<image>")] == [
        PAD,
        BOS,
        EOS,
        UNKNOWN,
        IMAGE,
    ]


@pytest.mark.parametrize("text", ["put the red box on the white plate", "In: naïve ☃?\nOut:", ""])
def test_any_text_survives(text):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS and UNKNOWN not in ids
    assert tokenizer.decode(ids) == text


def test_padding():
    text = pad_tokens([[5, 6], [7]], 3, ["a", "b"])
    np.testing.assert_array_equal(text.tokens, [[5, 6, 0], [7, 0, 0]])
    np.testing.assert_array_equal(text.mask, [[True, True, False], [True, False, False]])
    assert text.tokens.dtype == np.int32
    with pytest.raises(ValueError, match="text_length is 1, but 'a' has 2 tokens"):
        pad_tokens([[5, 6], [7]], 1, ["a", "b"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer file at .*nowhere.json"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
