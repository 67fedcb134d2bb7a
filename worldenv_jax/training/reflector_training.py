# SPDX-License-Identifier: Apache-2.0
"""Fitting the reflector: per-frame binary cross-entropy on true frames and on imagined frames of known outcome.

Imagined frames come from replaying recorded actions through the simulator: the frame's label is the true success at
the same step, so the judge is trained on what it will see (and on the simulator's mistakes).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np

from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.data.episodes import Episode
from worldenv_jax.data.windows import BatchSampler, ReflectorWindows
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.reflector_quality import choose_threshold, fit_temperature
from worldenv_jax.mesh import split_rows
from worldenv_jax.reflector import reflector_loss
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout
from worldenv_jax.simulator import check_actions
from worldenv_jax.training.augmentation import augment
from worldenv_jax.training.models import Models, take_rows
from worldenv_jax.training.pretrained import initial_reflector
from worldenv_jax.training.workdir import Workdir, mesh_from_config, run_training
from worldenv_jax.types import Array, Params, Prediction, ReflectorFns, Rollout, Starts, Text

REPLAY_BATCH = 64  # episodes replayed or judged at once

# (params, episodes, steps N) -> (R float32 [E, N], mask bool [E, N])
JudgeFn = Callable[[Params, Sequence[Episode], int], tuple[np.ndarray, np.ndarray]]


class ReflectorBatch(NamedTuple):
    """Frames of one episode per row, with the success of the row's instruction at each."""

    frames: np.ndarray  # uint8 [B, F, V, H, W, 3]
    index: np.ndarray  # int32 [B, F], the frames' times
    mask: np.ndarray  # bool [B, F], False on padding
    labels: np.ndarray  # bool [B, F]
    text: Text


def train_reflector(
    config: ExperimentConfig, workdir: Workdir, models: Models, episodes: Sequence[Episode], instructions: Sequence[str]
) -> Params:
    """Fits the reflector to episodes (true and imagined); returns its parameters."""
    stage = config.reflector_training
    reflector = config.reflector
    longest = max(episode.num_steps for episode in episodes) + 1
    if longest > reflector.max_frames:
        raise WorldEnvError(f"an episode has {longest} frames, reflector.max_frames is {reflector.max_frames}")
    streaming = reflector.mode == "streaming"
    length = (stage.frames or reflector.max_frames) if streaming else reflector.sampled_frames
    windows = ReflectorWindows(episodes, length, reflector.mode)
    sampler = BatchSampler(windows, stage.batch_size, config.seed)
    row_of = {instruction: row for row, instruction in enumerate(instructions)}

    def batch_fn(step: int) -> ReflectorBatch:
        rows = sampler.batch(step)
        task = np.array([row_of[instruction] for instruction in rows["instruction"]])
        text = Text(*take_rows(tuple(models.reflector_prompts), task))
        return ReflectorBatch(rows["frames"], rows["frame_index"], rows["frame_mask"], rows["labels"] > 0.5, text)

    def loss(params: Params, key: Array, batch: ReflectorBatch) -> tuple[Array, dict[str, Array]]:
        index = batch.index if streaming and stage.frames else None
        frames = augment(key, batch.frames, config.augmentation)
        return reflector_loss(reflector, params, frames, batch.text, batch.labels, batch.mask, index)

    mesh = mesh_from_config(config.mesh)
    params = initial_reflector(config, jax.random.key(config.seed + 3), mesh)
    return run_training(workdir, "reflector", stage, mesh, params, loss, batch_fn, jax.random.key(config.seed + 4))


def calibrate(
    config: ExperimentConfig, models: Models, params: Params, groups: Sequence[Sequence[Episode]]
) -> dict[str, float]:
    """Temperature and eta, fitted on held-out episodes: true ones and the simulator's replays alike.

    Returns:
      {"temperature": of R = sigmoid(logit / T), whatever it was before, "threshold": eta by `choose_threshold`}.
    """
    judged = [judge_episodes(models, params, episodes) for episodes in groups]
    probability, mask = np.concatenate([p for p, _ in judged]), np.concatenate([m for _, m in judged])
    label = np.concatenate([labels_of(models.config, episodes) for episodes in groups])
    if label[mask].all() or not label[mask].any():  # nothing to fit: the gate will say that nothing could be measured
        return {"temperature": config.reflector.temperature, "threshold": config.rollout.threshold}
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    logit = np.log(clipped / (1 - clipped))
    temperature = fit_temperature(logit[mask], label[mask])
    probability = 1 / (1 + np.exp(-logit / temperature))
    eta = choose_threshold(probability, label, mask, config.reflector_training.false_positive_rate)
    return {"temperature": temperature * models.config.reflector.temperature, "threshold": eta}


def judge_episodes(models: Models, params: Params, episodes: Sequence[Episode]) -> tuple[np.ndarray, np.ndarray]:
    """`make_judge` over the rollout's horizon."""
    return make_judge(models, REPLAY_BATCH)(params, episodes, horizon(models.config))


@lru_cache(maxsize=4)
def make_judge(models: Models, batch: int) -> JudgeFn:
    """Judges recorded episodes, `batch` of them at a time; compiled once.

    Returns:
      A function of (params, episodes, steps N) that returns R(o_1:t, g) float32 [E, N] for frames 1 .. N of each
      episode, N rounded up to whole chunks, and the mask bool [E, N]. R is 0 past an episode's end.
    """
    chunk, reflector = models.config.policy.chunk, models.reflector
    mesh = mesh_from_config(models.config.mesh)

    @jax.jit
    def judge(params, starts, frames):
        def one_chunk(state, part):
            return reflector.judge(params, state, Prediction(part, jax.numpy.zeros((*part.shape[:2], 8))))

        parts = frames.reshape(frames.shape[0], -1, chunk, *frames.shape[2:]).swapaxes(0, 1)
        _, probability = jax.lax.scan(one_chunk, reflector.init(params, starts), parts)
        return probability.swapaxes(0, 1).reshape(frames.shape[0], -1)

    def judge_all(params: Params, episodes: Sequence[Episode], steps: int) -> tuple[np.ndarray, np.ndarray]:
        results = []
        frames, valid = pad_steps([np.asarray(e.images[1:]) for e in episodes], -(-steps // chunk) * chunk)
        for first in range(0, len(episodes), batch):
            part = list(episodes[first : first + batch])
            rows = np.minimum(np.arange(batch), len(part) - 1)
            starts, images = split_rows((take_rows(models.starts(part), rows), frames[first + rows]), mesh)
            results.append(np.asarray(judge(params, starts, images))[: len(part)])
        return np.concatenate(results) * valid, valid

    return judge_all


def horizon(config: ExperimentConfig) -> int:
    """Steps of a rollout."""
    return config.rollout.num_chunks * config.policy.chunk


def labels_of(config: ExperimentConfig, episodes: Sequence[Episode]) -> np.ndarray:
    """The task predicate after each step of the horizon, bool [E, N]; False past an episode's end."""
    return pad_steps([episode.success[1:] for episode in episodes], horizon(config))[0]


def pad_steps(parts: Sequence[np.ndarray], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks [T_i, ...] arrays to [E, steps, ...] with zeros behind; and the mask bool [E, steps]."""
    stacked = np.zeros((len(parts), steps, *parts[0].shape[1:]), parts[0].dtype)
    valid = np.zeros((len(parts), steps), bool)
    for row, part in enumerate(parts):
        length = min(len(part), steps)
        stacked[row, :length], valid[row, :length] = part[:length], True
    return stacked, valid


def replay_episodes(
    models: Models, params: Params, episodes: Sequence[Episode], key: Array, num_chunks: int
) -> list[Episode]:
    """Open-loop prediction: each episode's actions through the simulator from its first frame.

    Args:
      models: whose simulator.
      params: the simulator's parameters.
      episodes: recorded ones; their first num_chunks * K steps are replayed.
      key: noise of the simulator.
      num_chunks: T.

    Returns:
      The same episodes with imagined frames and proprioception (actor "imagined"); actions and labels are the
      recorded ones, a frame that repeats a later one has the later one's label.

    Raises:
      WorldEnvError: frames, cameras or actions that the simulator cannot replay.
    """
    replay, mesh = make_replay(models, num_chunks), mesh_from_config(models.config.mesh)
    results: list[Episode] = []
    keys = jax.random.split(key, len(episodes))
    for first in range(0, len(episodes), REPLAY_BATCH):
        part = list(episodes[first : first + REPLAY_BATCH])
        rows = np.minimum(np.arange(REPLAY_BATCH), len(part) - 1)  # the last part is padded: one compilation
        normalised = recorded_chunks(models, part, num_chunks)[rows]
        starts, normalised = split_rows((take_rows(models.starts(part), rows), normalised), mesh)
        rollout = replay(params, keys[first + rows], starts, normalised)
        frames, proprio = np.asarray(rollout.frames), np.asarray(rollout.proprio)
        stride = models.config.simulator.frame_stride
        results += [_imagined(episode, frames[i], proprio[i], stride) for i, episode in enumerate(part)]
    return results


@lru_cache(maxsize=4)
def make_replay(models: Models, num_chunks: int) -> Callable[[Params, Array, Starts, Array], Rollout]:
    """The compiled replay: (simulator's parameters, keys [B], starts of B, actions of `recorded_chunks`) -> Rollout."""
    config = RolloutConfig(num_chunks=num_chunks, samples=1, early_stop=False)

    @jax.jit
    def replay(params: Params, keys: Array, starts: Starts, actions: Array) -> Rollout:
        rollout_params = RolloutParams((), params, ())
        return imagine_rollout(actions, models.simulator, NO_JUDGE, rollout_params, keys, starts, config)

    return replay


def recorded_chunks(models: Models, episodes: Sequence[Episode], num_chunks: int) -> np.ndarray:
    """Normalised actions float32 [E, T, K, 7] of the first T * K steps; a short episode ends without motion.

    Raises:
      WorldEnvError: actions that are NaN or out of range.
    """
    for episode in episodes:
        check_actions(episode.actions)
    actions = [_chunks(episode.actions, num_chunks, models.config.policy.chunk) for episode in episodes]
    return np.asarray(models.statistics.normalize_action(np.stack(actions)))


def _chunks(actions: np.ndarray, num_chunks: int, chunk: int) -> np.ndarray:
    """[T * K, 7] actions as [T, K, 7]; a short episode ends with zero deltas and the gripper held."""
    wanted = num_chunks * chunk
    held = np.zeros((max(0, wanted - len(actions)), actions.shape[1]), np.float32)
    held[:, 6] = actions[-1, 6]
    return np.concatenate([actions[:wanted], held]).reshape(num_chunks, chunk, -1)


def _imagined(episode: Episode, frames: np.ndarray, proprio: np.ndarray, stride: int) -> Episode:
    """The episode with what the simulator predicted, as far as both reach; labels are of the times that are shown."""
    steps = min(episode.num_steps, frames.shape[0] * frames.shape[1])
    join = lambda first, rest: np.concatenate([np.asarray(first)[None], rest.reshape(-1, *rest.shape[2:])[:steps]])
    shown = np.minimum(-(-np.arange(steps + 1) // stride) * stride, steps)
    return replace(
        episode,
        images=join(episode.images[0], frames),
        proprio=join(episode.proprio[0], proprio),
        actions=episode.actions[:steps],
        success=episode.success[shown],
        intrinsics=episode.intrinsics[: steps + 1],
        camera_pose=episode.camera_pose[: steps + 1],
        actor="imagined",
    )


def _judge_nothing(params: Params, state: tuple, prediction: Prediction) -> tuple[tuple, Array]:
    return state, jax.numpy.zeros(prediction.frames.shape[:2])


# For replays: frames only, no verdict.
NO_JUDGE = ReflectorFns(lambda params, starts: (), _judge_nothing)
