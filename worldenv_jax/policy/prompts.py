# SPDX-License-Identifier: Apache-2.0
"""Instructions as OpenVLA's prompt. Source: OpenVLA-OFT, `get_vla_action`."""

from worldenv_jax.data.tokenizer import load_tokenizer, pad_tokens
from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.types import Text

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"


def tokenize_policy_prompts(config: PolicyConfig, instructions: list[str]) -> Text:
    """Instructions to prompts: BOS, the lower-cased instruction in OpenVLA's words, `config.last_token`.

    Returns: Text of NumPy arrays, tokens int32 and mask bool [B, config.text_length].

    Raises: ValueError listing every instruction whose prompt is longer than `config.text_length`.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    rows = [tokenizer.encode(PROMPT.format(instruction=text.lower())).ids for text in instructions]
    if config.last_token is not None:
        rows = [row if row[-1] == config.last_token else [*row, config.last_token] for row in rows]
    return pad_tokens(rows, config.text_length, instructions)
