# SPDX-License-Identifier: Apache-2.0
"""Speed of the three models: one call of each, and a policy update."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.benchmarks.measure import (
    STATISTICS,
    Program,
    compile_program,
    figures,
    make_starts,
    measure_machine,
    median_seconds,
    random_params,
)
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.policy import init_policy, laplace_log_prob, policy_distribution
from worldenv_jax.policy.functions import apply_policy
from worldenv_jax.reflector import init_reflector, make_reflector_fns, success_logits
from worldenv_jax.simulator import Kinematics, encode_frames, init_simulator, make_simulator_fns
from worldenv_jax.simulator.conditioning import chunk_inputs, encode_image_tokens, predict_v, prepare
from worldenv_jax.training.post_training import make_update
from worldenv_jax.training.train_state import init_train_state
from worldenv_jax.types import Observation, Prediction, Rollout


def benchmark_policy(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The action distribution of a batch of observations, its language model alone, and an update on that batch."""
    batch = options.batch or config.post_training.starts * config.rollout.samples
    if batch < 2:
        raise WorldEnvError("policy: --batch must be at least 2, an update needs two trajectories to compare")
    machine = measure_machine(options.repeats, config.policy.llama.dtype)
    starts = make_starts(config, batch)
    params = random_params(init_policy, config.policy, options.dtype)
    forward = lambda params, observation: policy_distribution(config.policy, params, STATISTICS, observation)
    observation = Observation(starts.images, starts.proprio, starts.policy_text)
    program = compile_program(forward, params, observation)

    length, width = config.policy.sequence_length, config.policy.llama.width
    embeddings = jnp.ones((batch, length, width), config.policy.llama.dtype)
    decode = lambda model, embeddings: model.llama(embeddings, jnp.arange(length)[None], None)[0]
    language = compile_program(
        lambda params, embeddings: apply_policy(config.policy, params, embeddings, method=decode), params, embeddings
    )
    update = _policy_update(config, params, forward, observation)
    programs = (program, language, update)
    seconds = median_seconds([lambda p=p: p.call(*p.arguments) for p in programs], options.repeats)
    return {
        "figure": "actions_per_second",
        "actions_per_second": batch * config.policy.chunk / seconds[0],
        "observations_per_second": batch / seconds[0],
        "tokens_per_second": batch * length / seconds[0],
        **figures(program, seconds[0], machine),
        "language_model": {"tokens_per_second": batch * length / seconds[1], **figures(language, seconds[1], machine)},
        "update": {"observations_per_second": batch / seconds[2], **figures(update, seconds[2], machine)},
        "machine": machine,
        "shapes": {"images": list(starts.images.shape), "positions": length},
    }


def _policy_update(config: ExperimentConfig, params: Any, forward: Callable, observation: Observation) -> Program:
    """One LOOP-PPO update of what the config trains, on one chunk each of a group of trajectories."""
    batch, policy = len(observation.proprio), config.policy
    optimizer = config.post_training.optimizer
    training = replace(config.post_training, minibatches=1, epochs=1, chunks_at_once=0, max_kl=math.inf)
    update = make_update(forward, laplace_log_prob, training, config.loop, batch)
    loc, log_scale = jax.jit(forward)(params, observation)
    rollout = Rollout(
        observations=Observation(observation.images[:, None], observation.proprio[:, None], observation.text),
        actions=loc[:, None],
        log_prob=laplace_log_prob(loc, loc, log_scale).sum(-1)[:, None],
        loc=loc[:, None],
        log_scale=log_scale[:, None],
        frames=np.zeros((batch, 1, policy.chunk, 1, 1, 1, 3), np.uint8),  # not read
        proprio=np.zeros((batch, 1, policy.chunk, 8), np.float32),
        success_probability=np.zeros((batch, 1, policy.chunk), np.float32),
        valid=np.ones((batch, 1, policy.chunk), bool),
        reward=np.arange(batch) % 2.0,
        terminated=np.arange(batch) % 2 == 1,
        length=np.full(batch, policy.chunk),
    )
    state = init_train_state(params, optimizer, jax.random.key(3))
    return compile_program(update, state, jax.random.key(4), rollout)


def benchmark_simulator(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """One chunk (conditioning, every denoising step, decoding) and one denoising step by itself."""
    batch, simulator = options.batch or config.post_training.starts * config.rollout.samples, config.simulator
    machine = measure_machine(options.repeats, simulator.unet.dtype)
    kinematics = Kinematics.osc_pose()
    starts = make_starts(config, batch)
    params = random_params(init_simulator, simulator, options.dtype)
    keys = jax.random.split(jax.random.key(1), batch)
    actions = jnp.zeros((batch, simulator.chunk, 7))
    fns = make_simulator_fns(simulator, STATISTICS, kinematics)
    state = jax.jit(fns.init)(params, keys, starts)
    chunk = compile_program(fns.step, params, keys, state, actions)

    @jax.jit
    def condition(params):
        history = jnp.repeat(encode_frames(simulator, params, starts.images)[:, :, None], simulator.history, axis=2)
        proprio = jnp.zeros((batch, simulator.frames, 8))
        grasps = proprio[:, simulator.history :]
        scene = starts.camera, STATISTICS, kinematics, starts.photographs if simulator.photograph_size else None
        inputs = chunk_inputs(simulator, params, history, proprio, grasps, actions, *scene)
        tokens = encode_image_tokens(simulator, params, starts.images.astype(jnp.float32) / 127.5 - 1.0)
        return prepare(simulator, params, inputs, tokens), inputs.image_latents

    prepared, latents = condition(params)
    noise_step = jnp.zeros(latents.shape[:2], jnp.int32)
    denoise = lambda params, latents, t, prepared: predict_v(simulator, params, latents, t, prepared)
    step = compile_program(denoise, params, latents, noise_step, prepared)
    seconds = median_seconds([lambda p=p: p.call(*p.arguments) for p in (chunk, step)], options.repeats)
    return {
        "figure": "frames_per_second",
        "frames_per_second": batch * simulator.pictures / seconds[0],
        **figures(chunk, seconds[0], machine),
        "denoising_step": figures(step, seconds[1], machine),
        "machine": machine,
        "shapes": {"images": list(starts.images.shape), "chunk": simulator.chunk, "latents": list(latents.shape)},
        "ddim_steps": simulator.ddim_steps,
    }


def benchmark_reflector(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The judgement of one chunk of new frames in the middle of an episode.

    Streaming with its cache; without it, every frame of the horizon anew for one chunk (the same program judges all
    frames of a whole episode at once); and uniform, the language model anew for every frame.
    """
    batch, chunk = options.batch or config.post_training.starts * config.rollout.samples, config.policy.chunk
    reflector = replace(config.reflector, mode="streaming", kind="reward_head")
    machine = measure_machine(options.repeats, reflector.llava.language.dtype)
    starts = make_starts(config, batch)
    params = random_params(init_reflector, reflector, options.dtype)
    frames = np.repeat(starts.images[:, None], chunk, axis=1)
    prediction = Prediction(frames, np.zeros((batch, chunk, 8), np.float32))

    def judge(mode: str) -> Program:
        fns = make_reflector_fns(replace(reflector, mode=mode))
        state = jax.jit(fns.init)(params, starts)
        for _ in range(config.rollout.num_chunks // 2):
            state, _ = jax.jit(fns.judge)(params, state, prediction)
        return compile_program(fns.judge, params, state, prediction)

    horizon = config.rollout.num_chunks * chunk + 1
    whole = compile_program(
        lambda params, frames, text: success_logits(reflector, params, frames, text, jnp.ones(frames.shape[:2], bool)),
        params,
        np.repeat(starts.images[:, None], horizon, axis=1),
        starts.reflector_text,
    )
    programs = {"cached": judge("streaming"), "uncached": whole, "uniform": judge("uniform")}
    seconds = median_seconds([lambda p=p: p.call(*p.arguments) for p in programs.values()], options.repeats)
    rows = {
        name: {"frames_per_second": batch * chunk / taken, **figures(program, taken, machine)}
        for (name, program), taken in zip(programs.items(), seconds)
    }
    return {
        "figure": "frames_per_second",
        **rows.pop("cached"),
        **rows,
        "whole_episode_frames_per_second": batch * horizon / seconds[1],
        "machine": machine,
        "shapes": {"frames": list(frames.shape), "horizon": horizon, "sampled_frames": reflector.sampled_frames},
    }
