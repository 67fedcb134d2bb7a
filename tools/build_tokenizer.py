# SPDX-License-Identifier: Apache-2.0
"""Trains the small tokenizer that is shipped as worldenv_jax/assets/tokenizer.json.

    python tools/build_tokenizer.py --output=worldenv_jax/assets/tokenizer.json

A byte-level BPE over the policy's prompt, the instructions of the five LIBERO suites (read from the `libero` extra) and
of the embedded tabletop. Every byte is in its alphabet, so it encodes any text. Seconds; needs `make libero`.
"""

import importlib.util
import re
import runpy
from pathlib import Path

from absl import app, flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from worldenv_jax.envs.tabletop.config import INSTRUCTIONS
from worldenv_jax.policy import PROMPT

VOCABULARY = 512
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
JUDGE = ["Is the task done: {instruction}?", "Has the robot completed the task: {instruction}? Answer yes or no."]

_OUTPUT = flags.DEFINE_string("output", "worldenv_jax/assets/tokenizer.json", "Where to write the tokenizer.")


def instructions() -> list[str]:
    """LIBERO's instructions (a task name less its scene) and the tabletop's."""
    # The package itself asks a question on the terminal when it is imported.
    folder = Path(importlib.util.find_spec("libero").submodule_search_locations[0])
    suites = runpy.run_path(str(folder / "libero/benchmark/libero_suite_task_map.py"))["libero_task_map"]
    names = {re.sub(r"^[A-Z_]+SCENE\d+_", "", name) for suite in suites.values() for name in suite}
    return sorted({name.replace("_", " ") for name in names} | set(INSTRUCTIONS))


def build(texts: list[str]) -> Tokenizer:
    """Trains on `texts`; encoded text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def main(_: list[str]) -> None:
    """Trains and writes."""
    sentences = instructions()
    frames = ("{instruction}", PROMPT, *JUDGE)
    tokenizer = build([frame.format(instruction=sentence) for sentence in sentences for frame in frames])
    Path(_OUTPUT.value).write_text(tokenizer.to_str(pretty=True) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens from {len(sentences)} instructions -> {_OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
