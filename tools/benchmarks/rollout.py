# SPDX-License-Identifier: Apache-2.0
"""Speed of imagination: the fused scan, and its parts called from Python."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tools.benchmarks.measure import (
    STATISTICS,
    compile_program,
    figures,
    make_starts,
    measure_machine,
    median_seconds,
    random_params,
)
from worldenv_jax.configs import ExperimentConfig
from worldenv_jax.policy import init_policy, make_policy_fn
from worldenv_jax.reflector import init_reflector, make_reflector_fns
from worldenv_jax.rollout import (
    RolloutConfig,
    RolloutParams,
    end_of_trajectories,
    fold_in,
    imagine_rollout,
    repeat_starts,
)
from worldenv_jax.simulator import Kinematics, init_simulator, make_simulator_fns
from worldenv_jax.types import Observation, Starts

NEVER = 2.0  # a threshold that no probability exceeds: every frame of the horizon is imagined


def benchmark_rollout(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Imagination as one program, against its three parts jitted one by one and called from Python."""
    rollout = RolloutConfig(config.rollout.num_chunks, config.rollout.samples, threshold=NEVER)
    count = max(1, (options.batch or config.post_training.starts * rollout.samples) // rollout.samples)
    machine = measure_machine(options.repeats)
    starts = make_starts(config, count)
    params = RolloutParams(
        random_params(init_policy, config.policy, options.dtype),
        random_params(init_simulator, config.simulator, options.dtype),
        random_params(init_reflector, config.reflector, options.dtype),
    )
    policy = make_policy_fn(config.policy, STATISTICS)
    simulator = make_simulator_fns(config.simulator, STATISTICS, Kinematics.osc_pose())
    reflector = make_reflector_fns(config.reflector)
    fused = compile_program(
        lambda params, key, starts: imagine_rollout(policy, simulator, reflector, params, key, starts, rollout),
        params,
        jax.random.key(2),
        starts,
    )
    parts = separate_parts(policy, simulator, reflector, rollout)
    began = time.perf_counter()
    jax.block_until_ready(parts(*fused.arguments))
    parts_first = time.perf_counter() - began
    seconds = median_seconds([lambda: fused.call(*fused.arguments), lambda: parts(*fused.arguments)], options.repeats)
    frames = count * rollout.samples * rollout.num_chunks * config.simulator.pictures
    return {
        "figure": "imagined_frames_per_second",
        "imagined_frames_per_second": frames / seconds[0],
        **figures(fused, seconds[0], machine),
        "separate_parts": {
            "imagined_frames_per_second": frames / seconds[1],
            "seconds": seconds[1],
            "first_call_seconds": parts_first,
        },
        "fused_over_separate": seconds[1] / seconds[0],
        "machine": machine,
        "shapes": {
            "starts": count,
            "samples": rollout.samples,
            "chunks": rollout.num_chunks,
            "chunk": config.policy.chunk,
            "images": list(starts.images.shape[1:]),
        },
    }


def separate_parts(policy: Any, simulator: Any, reflector: Any, rollout: RolloutConfig) -> Callable:
    """(params, key, starts) -> frames and rewards: the loop of `imagine_rollout` in Python over five jitted parts."""
    begin, judge_start = jax.jit(simulator.init), jax.jit(reflector.init)
    act, step, judge = jax.jit(policy), jax.jit(simulator.step), jax.jit(reflector.judge)
    end = jax.jit(lambda *arrays: end_of_trajectories(*arrays, rollout))
    repeat = jax.jit(lambda starts: repeat_starts(starts, rollout.samples))
    fold = jax.jit(fold_in)

    def imagine(params: RolloutParams, key: Any, starts: Starts):
        starts = repeat(starts)
        keys = jax.random.split(key, len(starts.task))
        world = begin(params.simulator, fold(keys, 0), starts)
        state = judge_start(params.reflector, starts)
        alive, reward = jnp.ones(len(keys), bool), jnp.zeros(len(keys))
        images, proprio, frames = starts.images, starts.proprio, []
        for chunk in range(rollout.num_chunks):
            now = fold(keys, chunk + 1)
            action = act(params.policy, fold(now, 0), Observation(images, proprio, starts.policy_text))
            world, prediction = step(params.simulator, fold(now, 1), world, action.actions)
            state, probability = judge(params.reflector, state, prediction)
            _, alive, reward = end(probability, alive, reward)
            images, proprio = prediction.frames[:, -1], prediction.proprio[:, -1]
            frames.append(prediction.frames)
        return frames, reward

    return imagine
