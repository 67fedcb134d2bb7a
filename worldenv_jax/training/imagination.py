# SPDX-License-Identifier: Apache-2.0
"""The post-training stage: iterations of LOOP-PPO in a world, a held-out estimate, the best parameters kept.

The world is the learned simulator with the learned reflector; a true world behind the same functions gives the upper
bound with the same code.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from worldenv_jax import files
from worldenv_jax.checkpoints import Checkpointer
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.critic import CriticState, make_critic
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.rlds import add_episodes
from worldenv_jax.envs.base import Environment
from worldenv_jax.evaluation.agreement import imagination_agreement
from worldenv_jax.evaluation.strips import Strip, draw_strip, draw_video, merge_views, save_image, save_video
from worldenv_jax.mesh import own_rows, shard_batch, shard_state, shardings, split_rows
from worldenv_jax.metrics import make_writer
from worldenv_jax.policy import laplace_log_prob, policy_distribution
from worldenv_jax.rollout import RolloutParams
from worldenv_jax.training.loop import run_stage
from worldenv_jax.training.models import Models
from worldenv_jax.training.post_training import (
    collect_contrast,
    make_imagine,
    make_update,
    rollout_metrics,
    sample_starts,
)
from worldenv_jax.training.train_state import TrainState, ema_params, init_train_state
from worldenv_jax.training.workdir import Workdir, mesh_from_config
from worldenv_jax.types import Array, EpisodeSpec, Observation, Params, ReflectorFns, Rollout, SimulatorFns, Starts


class World(NamedTuple):
    """What answers the policy's actions, and what judges."""

    simulator: SimulatorFns
    reflector: ReflectorFns
    simulator_params: Params
    reflector_params: Params


class Trials(NamedTuple):
    """Where the trajectories of post-training come from."""

    # (params, key, iteration, attempt) -> trajectories of S x G rows on the mesh, sampled with the exploration factor
    rollout: Callable[[Params, Array, int, int], Rollout]
    # params -> {"held_out_reward", "held_out_terminated"}, from starts that are never learned from
    estimate: Callable[[Params], dict[str, float]]


class Learners(NamedTuple):
    """What post-training trains."""

    policy: TrainState
    critic: CriticState | None  # with `post_training.critic.updates`


def imagined_trials(config: ExperimentConfig, models: Models, world: World, starts: Starts, held_out: Starts) -> Trials:
    """Trajectories imagined in a world from first frames: `starts` to learn from, `held_out` for the estimate."""
    settings, samples, mesh = config.post_training, config.rollout.samples, mesh_from_config(config.mesh)
    frozen = shard_state({"simulator": world.simulator_params, "reflector": world.reflector_params}, mesh)
    world = world._replace(simulator_params=frozen["simulator"], reflector_params=frozen["reflector"])
    imagine = make_imagine(models.policy(settings.scale_factor), world.simulator, world.reflector, config.rollout)

    def rollout(params: Params, key: Array, number: int, attempt: int) -> Rollout:
        chosen = sample_starts(starts, settings.starts, samples, config.seed, number, attempt)
        roll = RolloutParams(params, world.simulator_params, world.reflector_params)
        return imagine(roll, key, shard_batch(own_rows(chosen, mesh), mesh))

    return Trials(rollout, make_estimate(config, models, world, held_out))


def post_train(
    config: ExperimentConfig,
    workdir: Workdir,
    models: Models,
    trials: Trials,
    params: Params,
    stage: str = "post_train",
) -> Params:
    """Runs all iterations from where they stopped; returns the best parameters by the held-out estimate.

    With `optimizer.ema_decay` these are moving averages: the last updates of a policy are mostly noise.

    Args:
      trials: where trajectories come from.
      params: the cloned policy's.
      stage: name of the checkpoints and metrics.
    """
    settings, samples = config.post_training, config.rollout.samples
    mesh, key = mesh_from_config(config.mesh), jax.random.key(config.seed + 20)
    vocabulary = config.policy.llama.vocab_size
    critic = make_critic(settings.critic, models.statistics, vocabulary, config.rollout.num_chunks)
    critic_state = critic.init(jax.random.fold_in(key, 0)) if settings.critic.updates else None
    state = shard_state(Learners(init_train_state(params, settings.optimizer, key), critic_state), mesh)
    distribution = partial(_scaled_distribution, config, models)
    layout = shardings(state.policy, mesh)
    update = make_update(distribution, laplace_log_prob, settings, config.loop, samples, layout)

    def iteration(state: Learners, number: int) -> tuple[Learners, dict[str, Array]]:
        policy, critic_state = state
        key = jax.random.fold_in(policy.key, number)
        attempt = lambda index: trials.rollout(policy.params, jax.random.fold_in(key, 2 * index), number, index)
        rollout, extra = collect_contrast(attempt, settings, config.loop, samples)
        metrics, values = {"extra_rollouts": jnp.float32(extra)}, None
        if critic_state is not None:
            values = critic.values(critic_state, rollout)
            critic_state, learned = critic.learn(critic_state, jax.random.fold_in(key, 3), rollout)
            metrics |= learned
        if critic_state is None or number >= settings.critic.warmup:
            policy, learned = update(policy, jax.random.fold_in(key, 1), rollout, values)
        else:
            learned = rollout_metrics(rollout, samples)
        return Learners(policy, critic_state), {**learned, **metrics}

    with (
        jax.set_mesh(mesh),
        workdir.timed(stage),
        workdir.checkpointer(stage) as checkpointer,
        make_writer(workdir / "metrics", stage) as writer,
    ):
        if checkpointer.best_score is None:
            start = trials.estimate(state.policy.params)
            writer.resume(-1)
            writer.write(0, start)
            checkpointer.save_best(0, state, start["held_out_reward"])
        run_stage(
            stage,
            state,
            iteration,
            lambda number: number,
            settings.iterations,
            checkpointer=checkpointer,
            writer=writer,
            save_every=settings.evaluate_every,
            log_every=1,
            callbacks=((settings.evaluate_every, partial(_keep_best, checkpointer, trials.estimate)),),
        )
        return ema_params(checkpointer.restore_best(state).state.policy)


def make_estimate(config: ExperimentConfig, models: Models, world: World, held_out: Starts):
    """params -> {"held_out_reward", "held_out_terminated"} from held-out starts, fixed noise.

    Of the mean action, or with `post_training.held_out_samples` of as many samples from each start.
    """
    samples = config.post_training.held_out_samples
    policy = models.policy(config.post_training.scale_factor) if samples else models.policy(deterministic=True)
    imagine = make_imagine(policy, world.simulator, world.reflector, config.rollout)
    repeated = jax.tree.map(lambda leaf: np.repeat(leaf, max(samples, 1), axis=0), held_out)
    held_out = split_rows(repeated, mesh_from_config(config.mesh))
    key = jax.random.key(config.seed + 21)

    def estimate(params: Params) -> dict[str, float]:
        result = imagine(RolloutParams(params, world.simulator_params, world.reflector_params), key, held_out)
        return {
            "held_out_reward": float(result.reward.mean()),
            "held_out_terminated": float(result.terminated.mean()),
        }

    return estimate


def measure_agreement(
    config: ExperimentConfig,
    workdir: Workdir,
    models: Models,
    world: World,
    params: Params,
    episodes: Sequence[Episode],
    environment: Environment,
) -> dict[str, Any]:
    """Imagines one sampled trajectory per start, replays its actions in the true world, compares the outcomes.

    After the imagined end the hand holds still for one more chunk, because the judge may speak a few frames early.
    Writes agreement.json and strips of true and imagined frames side by side.
    """
    policy = models.policy(config.post_training.scale_factor)
    imagine = make_imagine(policy, world.simulator, world.reflector, config.rollout)
    roll = RolloutParams(params, world.simulator_params, world.reflector_params)
    starts = split_rows(models.starts(episodes), mesh_from_config(config.mesh))
    rollout = jax.device_get(imagine(roll, jax.random.key(config.seed + 22), starts))
    actions = executed_actions(models, rollout)
    specs = [episode.spec for episode in episodes]
    frames, success = replay_in_environment(environment, specs, actions)
    reach = np.arange(success.shape[1]) < rollout.length[:, None] + config.policy.chunk
    verdict = judged_successes(rollout, config.rollout.threshold)
    result = imagination_agreement(verdict, (success & reach).any(1))
    files.write_json(workdir / "agreement.json", result)
    _draw_agreement(config, workdir, episodes, rollout, verdict, frames, success)
    return result


def judged_successes(rollout: Rollout, threshold: float) -> np.ndarray:
    """Bool [B], R > eta at some frame: where trajectories end early, those that did."""
    return (np.asarray(rollout.success_probability) > threshold).any((1, 2))


def save_imagined(
    config: ExperimentConfig,
    workdir: Workdir,
    models: Models,
    world: World,
    params: Params,
    episodes: Sequence[Episode],
) -> Path:
    """Imagines one trajectory of the policy from the first frame of each episode; saves episodes and videos.

    Returns:
      The new folder below data/imagined, in the schema of all other episodes; `success` is the reflector's verdict.
    """
    imagine = make_imagine(models.policy(), world.simulator, world.reflector, config.rollout)
    roll = RolloutParams(params, world.simulator_params, world.reflector_params)
    rollout = jax.device_get(imagine(roll, jax.random.key(config.seed + 23), models.starts(episodes)))
    actions = executed_actions(models, rollout)
    dreams = [_as_episode(config, episode, rollout, actions, row) for row, episode in enumerate(episodes)]
    for row, dream in enumerate(dreams):
        probability = rollout.success_probability[row].reshape(-1)[: dream.num_steps]
        strip = Strip(
            imagined=merge_views(dream.images),
            probability=np.concatenate([[np.nan], probability]),
            threshold=config.rollout.threshold,
            end=dream.num_steps if rollout.terminated[row] else None,
        )
        caption = f"Imagined: {dream.instruction}"
        save_video(workdir.add_picture(f"imagined_{row}.webp", caption), draw_video(strip))
    return add_episodes(workdir / "data" / "imagined", dreams)


def _as_episode(config: ExperimentConfig, start: Episode, rollout: Rollout, actions: np.ndarray, row: int) -> Episode:
    """Row `row` of a rollout up to its end."""
    length = int(rollout.length[row])
    join = lambda first, rest: np.concatenate([np.asarray(first)[None], rest.reshape(-1, *rest.shape[2:])[:length]])
    verdict = rollout.success_probability[row].reshape(-1)[:length] > config.rollout.threshold
    still = lambda leaf: np.repeat(np.asarray(leaf[:1]), length + 1, axis=0)
    return replace(
        start,
        images=join(start.images[0], rollout.frames[row]),
        proprio=join(start.proprio[0], rollout.proprio[row]),
        actions=actions[row].reshape(-1, actions.shape[-1])[:length],
        success=np.concatenate([[False], verdict]),
        intrinsics=still(start.intrinsics),
        camera_pose=still(start.camera_pose),
        actor="imagined",
    )


def executed_actions(models: Models, rollout: Rollout) -> np.ndarray:
    """Environment actions float32 [B, T, K, 7] of a rollout; after its end zero deltas and the gripper held."""
    actions = np.array(models.statistics.unnormalize_action(rollout.actions))
    flat = actions.reshape(len(actions), -1, actions.shape[-1])
    for row, length in zip(flat, rollout.length):
        row[length:, :6] = 0.0
        row[length:, 6] = row[length - 1, 6]
    return flat.reshape(actions.shape)


def replay_in_environment(
    environment: Environment, specs: Sequence[EpisodeSpec], actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recorded action sequences in the true world.

    Args:
      specs: the start of each sequence.
      actions: environment actions float32 [B, T, K, 7].

    Returns:
      frames uint8 [B, T * K, V, H, W, 3] and success bool [B, T * K], after every action.
    """
    frames, success = [], []
    for first in range(0, len(specs), environment.num_slots):
        part = specs[first : first + environment.num_slots]
        slots = list(range(len(part)))
        environment.reset(slots, part)
        chunks = [
            environment.step(slots, actions[first : first + len(part), t], every_frame=True)
            for t in range(actions.shape[1])
        ]
        frames.append(np.concatenate([chunk.images for chunk in chunks], axis=1))
        success.append(np.concatenate([chunk.success for chunk in chunks], axis=1))
    return np.concatenate(frames), np.concatenate(success)


def _scaled_distribution(
    config: ExperimentConfig, models: Models, params: Params, observation: Observation
) -> tuple[Array, Array]:
    """The distribution that the behaviour policy samples from: the exploration factor belongs to it."""
    loc, log_scale = policy_distribution(config.policy, params, models.statistics, observation)
    return loc, log_scale + jnp.log(config.post_training.scale_factor)


def _keep_best(checkpointer: Checkpointer, estimate, step: int, state: Learners) -> dict[str, float]:
    figures = estimate(ema_params(state.policy))
    checkpointer.save_best(step, state, figures["held_out_reward"])
    return figures


def _draw_agreement(
    config: ExperimentConfig,
    workdir: Workdir,
    episodes: Sequence[Episode],
    rollout: Rollout,
    verdict: np.ndarray,
    frames: np.ndarray,
    success: np.ndarray,
) -> None:
    """Two imagined successes that were true, two that were hallucinated, one imagined failure; strip and video."""
    true = success.any(1)
    cases = {
        "true_success": np.flatnonzero(verdict & true)[:2],
        "hallucinated_success": np.flatnonzero(verdict & ~true)[:2],
        "imagined_failure": np.flatnonzero(~verdict)[:1],
    }
    for case, rows in cases.items():
        for row in rows:
            length = int(rollout.length[row])
            dream = rollout.frames[row].reshape(-1, *rollout.frames.shape[3:])[:length]
            first = np.asarray(episodes[row].images[0])[None]
            strip = Strip(
                imagined=merge_views(np.concatenate([first, dream])),
                true=merge_views(np.concatenate([first, frames[row, :length]])),
                probability=np.concatenate([[np.nan], rollout.success_probability[row].reshape(-1)[:length]]),
                threshold=config.rollout.threshold,
                end=length if rollout.terminated[row] else None,
                success=np.concatenate([[False], success[row, :length]]),
            )
            caption = f"{case.replace('_', ' ').capitalize()}: {episodes[row].instruction}"
            save_image(workdir.add_picture(f"{case}_{row}.png", caption), draw_strip(strip))
            save_video(workdir.add_picture(f"{case}_{row}.webp", caption), draw_video(strip))
