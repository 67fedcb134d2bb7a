# SPDX-License-Identifier: Apache-2.0
"""The instant reflector: a vision-language model that says, frame by frame, whether the task is done."""

from worldenv_jax.reflector.config import ReflectorConfig, trainable_patterns
from worldenv_jax.reflector.judge import make_reflector_fns
from worldenv_jax.reflector.loss import reflector_loss
from worldenv_jax.reflector.model import init_reflector, success_logits
from worldenv_jax.reflector.prompts import answering, tokenize_reflector_prompts

__all__ = [
    "ReflectorConfig",
    "answering",
    "init_reflector",
    "make_reflector_fns",
    "reflector_loss",
    "success_logits",
    "tokenize_reflector_prompts",
    "trainable_patterns",
]
