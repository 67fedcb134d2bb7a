# SPDX-License-Identifier: Apache-2.0
"""The policy: OpenVLA-OFT's vision-language-action model with RIPT-VLA's Laplace scale head."""

from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.policy.functions import (
    diffusion_actions,
    diffusion_loss,
    init_policy,
    make_policy_fn,
    merge_adapters,
    policy_distribution,
)
from worldenv_jax.policy.laplace import laplace_log_prob
from worldenv_jax.policy.prompts import PROMPT, tokenize_policy_prompts

__all__ = [
    "PROMPT",
    "PolicyConfig",
    "diffusion_actions",
    "diffusion_loss",
    "init_policy",
    "laplace_log_prob",
    "make_policy_fn",
    "merge_adapters",
    "policy_distribution",
    "tokenize_policy_prompts",
]
