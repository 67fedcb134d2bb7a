# SPDX-License-Identifier: Apache-2.0
"""Imitation: L1 for the action head, then Laplace negative log-likelihood for the scale head.

The L1 recipe is OpenVLA-OFT's (arXiv 2502.19645). The scale head's is ours, because RIPT-VLA never released one: the
mean is held fixed (no gradient through `loc`) and only the scale head learns how far the demonstrations lie from it.

Self-imitation, the same on the policy's own successes besides, is not in World-Env. It uses what exploration for the
simulator has found anyway, so it is what imagination has to be compared with.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax.configs import AugmentationConfig, ExperimentConfig
from worldenv_jax.data.episodes import Episode, until_success
from worldenv_jax.data.windows import BatchSampler, PolicyWindows
from worldenv_jax.policy import PolicyConfig, laplace_log_prob, policy_distribution
from worldenv_jax.training.augmentation import augment
from worldenv_jax.training.models import Models
from worldenv_jax.training.pretrained import initial_policy
from worldenv_jax.training.train_state import LossFn
from worldenv_jax.training.workdir import Workdir, mesh_from_config, run_training
from worldenv_jax.types import Array, Observation, Params, Statistics


class CloningBatch(NamedTuple):
    """What was seen, and the K actions that followed."""

    observation: Observation
    actions: Array  # float32 [B, K, 7], normalised, clipped to [-1, 1] (gripper 1 = open, 0 = close)


def make_action_loss(config: PolicyConfig, statistics: Statistics, augmentation: AugmentationConfig) -> LossFn:
    """mean |a - loc| over chunk and dimensions, gripper included."""

    def loss(params: Params, key: Array, batch: CloningBatch) -> tuple[Array, dict[str, Array]]:
        images = augment(key, batch.observation.images, augmentation)
        loc, _ = policy_distribution(config, params, statistics, batch.observation._replace(images=images))
        error = jnp.abs(batch.actions - loc)
        return error.mean(), {"l1_pose": error[..., :6].mean(), "l1_gripper": error[..., 6].mean()}

    return loss


def make_scale_loss(config: PolicyConfig, statistics: Statistics, augmentation: AugmentationConfig) -> LossFn:
    """-log p(a) summed over dimensions, averaged over batch and chunk; `loc` takes no gradient."""

    def loss(params: Params, key: Array, batch: CloningBatch) -> tuple[Array, dict[str, Array]]:
        images = augment(key, batch.observation.images, augmentation)
        loc, log_scale = policy_distribution(config, params, statistics, batch.observation._replace(images=images))
        log_prob = laplace_log_prob(batch.actions, jax.lax.stop_gradient(loc), log_scale)
        return -log_prob.sum(-1).mean(), {"scale": jnp.exp(log_scale).mean()}

    return loss


def clone_policy(
    config: ExperimentConfig,
    workdir: Workdir,
    models: Models,
    demonstrations: Sequence[Episode],
    stages: tuple[str, str] = ("clone_policy", "scale_head"),
) -> Params:
    """Both stages: L1 on everything but the scale head, then the scale head alone. Returns the policy's parameters.

    Args:
      stages: names of the checkpoints and metrics of the two.
    """
    augmentation = config.augmentation
    action_loss = make_action_loss(config.policy, models.statistics, augmentation)
    scale_loss = make_scale_loss(config.policy, models.statistics, augmentation)
    episodes = [replace(episode, images=np.asarray(episode.images[:])) for episode in demonstrations]
    mesh = mesh_from_config(config.mesh)
    params = initial_policy(config, jax.random.key(config.seed), mesh)
    for name, loss, stage, offset in (
        (stages[0], action_loss, config.cloning, 1),
        (stages[1], scale_loss, config.scale_head, 2),
    ):
        windows = PolicyWindows(episodes, config.policy.chunk, pad=True)
        sampler = BatchSampler(windows, stage.batch_size, config.seed + offset)
        key = jax.random.key(config.seed + offset)
        params = run_training(workdir, name, stage, mesh, params, loss, make_cloning_batches(models, sampler), key)
    return params


def own_successes(episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes that succeed, each up to its first success, as demonstrations end."""
    return [until_success(episode) for episode in episodes if episode.succeeded and episode.first_success]


def make_cloning_batches(models: Models, sampler: BatchSampler) -> Callable[[int], CloningBatch]:
    """step -> batch; the normalised targets are clipped to [-1, 1] as in OpenVLA-OFT."""

    def batch_fn(step: int) -> CloningBatch:
        rows = sampler.batch(step)
        text = jax.tree.map(lambda leaf: np.asarray(leaf)[rows["task"]], models.policy_prompts)
        actions = np.clip(np.asarray(models.statistics.normalize_action(rows["actions"])), -1.0, 1.0)
        return CloningBatch(Observation(rows["images"], rows["proprio"], text), actions)

    return batch_fn
