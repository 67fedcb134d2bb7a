# SPDX-License-Identifier: Apache-2.0
"""Instructions to token ids, and the bare vision-language model as a judge (the ablation of World-Env)."""

from collections.abc import Sequence
from dataclasses import replace

from worldenv_jax.data.tokenizer import load_tokenizer, pad_tokens
from worldenv_jax.reflector.config import ReflectorConfig
from worldenv_jax.types import Text


def tokenize_reflector_prompts(config: ReflectorConfig, instructions: Sequence[str]) -> Text:
    """Instructions to the text that stands before the frames: NumPy, [B, config.text_length].

    Raises ValueError on an empty instruction, and where a prompt is longer than config.text_length.
    """
    empty = [i for i, instruction in enumerate(instructions) if not instruction.strip()]
    if empty:
        raise ValueError(f"reflector: instructions {empty} are empty, expected what the robot is to do")
    tokenizer = load_tokenizer(config.tokenizer)
    prompts = [config.prompt.format(instruction=instruction.strip().lower()) for instruction in instructions]
    rows = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    return pad_tokens(rows, config.text_length, prompts)


def answering(
    config: ReflectorConfig,
    question: str = "Is the task done? Answer yes or no. ASSISTANT:",
    answers: tuple[str, str] = ("yes", "no"),
) -> ReflectorConfig:
    """The same model as a judge without a reward head: R = softmax over the logits of its two answers.

    Args:
        question: asked after the frames.
        answers: for success and for failure; the first token of each is compared.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    yes, no = (encode(answer)[0] for answer in answers)
    asked = tuple(encode(question))
    return replace(config, kind="answer", mode="uniform", question=asked, yes_token=yes, no_token=no)
