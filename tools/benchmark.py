# SPDX-License-Identifier: Apache-2.0
"""Speed of the parts of a run, one JSON line each, beside what this machine can do.

    python tools/benchmark.py rollout --config=tabletop            # imagined frames/s: fused scan, and separate parts
    python tools/benchmark.py policy --config=tabletop --batch=64
    python tools/benchmark.py simulator --batch=4 --set=simulator.unet.channels=64
    python tools/benchmark.py reflector --config=tabletop
    python tools/benchmark.py data --config=tabletop               # training windows/s from episodes on disk
    python tools/benchmark.py machine

Seconds are medians over `--repeats` calls after one that is not counted. Models have random parameters. `flops` are
counted in the jaxpr (matrix products and convolutions, scans times their length; `tools/flops.py`), `utilisation` is
flops/s over the matmul rate that the machine itself reached just before. `peak_bytes` are arguments, outputs and
temporaries of the compiled program; `device_peak_bytes` what the device's allocator saw, where it tells. Compilation
is not served from a cache.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from tools.flops import count_flops  # noqa: E402
from worldenv_jax.configs import PRESETS, ExperimentConfig, get_config  # noqa: E402
from worldenv_jax.data.episodes import Episode  # noqa: E402
from worldenv_jax.data.image_codec import IMAGE_ENCODINGS  # noqa: E402
from worldenv_jax.data.loader import load_batches  # noqa: E402
from worldenv_jax.data.rlds import open_episodes, write_episodes  # noqa: E402
from worldenv_jax.data.windows import (  # noqa: E402
    BatchSampler,
    PolicyWindows,
    ReflectorWindows,
    SimulatorWindows,
)
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.evaluation.summary import peak_rss_bytes  # noqa: E402
from worldenv_jax.manifest import git_commit  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.policy import init_policy, make_policy_fn, policy_distribution  # noqa: E402
from worldenv_jax.reflector import init_reflector, make_reflector_fns  # noqa: E402
from worldenv_jax.rollout import (  # noqa: E402
    RolloutConfig,
    RolloutParams,
    end_of_trajectories,
    fold_in,
    imagine_rollout,
    repeat_starts,
)
from worldenv_jax.simulator import (  # noqa: E402
    Kinematics,
    encode_frames,
    history_steps,
    init_simulator,
    make_simulator_fns,
)
from worldenv_jax.simulator.conditioning import chunk_inputs, encode_image_tokens, predict_v, prepare  # noqa: E402
from worldenv_jax.types import Camera, Observation, Prediction, Starts, Statistics, Text  # noqa: E402

READ_AHEAD = 8  # batches that the loader keeps ready: so many are not counted
NEVER = 2.0  # a threshold that no probability exceeds: every frame of the horizon is imagined
STATISTICS = Statistics(
    -np.ones(7, np.float32), np.ones(7, np.float32), -np.ones(8, np.float32), np.ones(8, np.float32)
)


class Program(NamedTuple):
    """A compiled function with its arguments."""

    call: Callable
    arguments: tuple[Any, ...]
    compile_seconds: float
    flops: int
    peak_bytes: int


def compile_program(function: Callable, *arguments: Any) -> Program:
    """Lowers and compiles for concrete arguments, which are put on the device."""
    arguments = jax.device_put(arguments)
    flops = count_flops(function, *arguments)
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Program(compiled, arguments, seconds, flops, peak - memory.alias_size_in_bytes)


def median_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median wall-clock seconds of each call; the calls take turns, so that a disturbance meets all of them."""
    for call in calls:
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds):
            began = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in seconds]


def measure_machine(repeats: int, dtype: str = "float32") -> dict[str, float]:
    """Rates that this device reaches: square matmul in `dtype`, and reading plus writing an array of 256 MiB."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    long = jnp.ones(2**26, jnp.float32)
    multiply = jax.jit(jnp.matmul)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)  # in place: fresh memory would measure page faults

    def rewrite() -> jax.Array:
        nonlocal long
        long = add(long)
        return long

    matmul, copy = median_seconds([lambda: multiply(square, square), rewrite], repeats)
    return {
        "matmul_dtype": dtype,
        "matmul_gflops": 2e-9 * size**3 / matmul,
        "bandwidth_gb_per_s": 2e-9 * long.nbytes / copy,
    }


def figures(program: Program, seconds: float, machine: dict[str, float]) -> dict[str, Any]:
    """Time, operations, utilisation and memory of one program."""
    rate = 1e-9 * program.flops / seconds
    return {
        "seconds": seconds,
        "compile_seconds": program.compile_seconds,
        "flops": program.flops,
        "gflops": rate,
        "utilisation": rate / machine["matmul_gflops"],
        "peak_bytes": program.peak_bytes,
    }


def make_starts(config: ExperimentConfig, count: int) -> Starts:
    """Starts with random pictures: first frames, empty prompts, a camera one metre in front of the origin."""
    rng = np.random.default_rng(0)
    views, (height, width) = config.simulator.views, config.simulator.image_size
    text = lambda length: Text(np.ones((count, length), np.int32), np.ones((count, length), bool))
    lens = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float32)
    pose = np.eye(4, dtype=np.float32)
    pose[2, 3] = -1.0
    return Starts(
        images=rng.integers(0, 256, (count, views, height, width, 3), np.uint8),
        proprio=np.zeros((count, 8), np.float32),
        policy_text=text(config.policy.text_length),
        reflector_text=text(config.reflector.text_length),
        camera=Camera(np.tile(lens, (count, views, 1, 1)), np.tile(pose, (count, views, 1, 1))),
        task=np.zeros(count, np.int32),
    )


def random_params(init: Callable, config: Any, dtype: str) -> Any:
    """Random parameters in the given type, made on the device in one program."""
    cast = lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.jit(lambda key: jax.tree.map(cast, init(config, key)))(jax.random.key(0))


def benchmark_machine(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What the machine can do."""
    return {"figure": "matmul_gflops", "machine": measure_machine(options.repeats, options.dtype)}


def benchmark_policy(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """One forward pass: the action distribution of a batch of observations."""
    batch = options.batch or config.post_training.starts * config.rollout.samples
    machine = measure_machine(options.repeats, config.policy.llama.dtype)
    starts = make_starts(config, batch)
    params = random_params(init_policy, config.policy, options.dtype)
    forward = lambda params, observation: policy_distribution(config.policy, params, STATISTICS, observation)
    observation = Observation(starts.images, starts.proprio, starts.policy_text)
    program = compile_program(forward, params, observation)
    (seconds,) = median_seconds([lambda: program.call(*program.arguments)], options.repeats)
    return {
        "figure": "observations_per_second",
        "observations_per_second": batch / seconds,
        **figures(program, seconds, machine),
        "machine": machine,
        "shapes": {"images": list(starts.images.shape), "positions": config.policy.sequence_length},
    }


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
        inputs = chunk_inputs(simulator, params, history, proprio, actions, starts.camera, STATISTICS, kinematics)
        tokens = encode_image_tokens(simulator, params, starts.images.astype(jnp.float32) / 127.5 - 1.0)
        return prepare(simulator, params, inputs, tokens), inputs.image_latents

    prepared, latents = condition(params)
    noise_step = jnp.zeros(latents.shape[:2], jnp.int32)
    denoise = lambda params, latents, t, prepared: predict_v(simulator, params, latents, t, prepared)
    step = compile_program(denoise, params, latents, noise_step, prepared)
    seconds = median_seconds([lambda p=p: p.call(*p.arguments) for p in (chunk, step)], options.repeats)
    return {
        "figure": "frames_per_second",
        "frames_per_second": batch * simulator.chunk / seconds[0],
        **figures(chunk, seconds[0], machine),
        "denoising_step": figures(step, seconds[1], machine),
        "machine": machine,
        "shapes": {"images": list(starts.images.shape), "chunk": simulator.chunk, "latents": list(latents.shape)},
        "ddim_steps": simulator.ddim_steps,
    }


def benchmark_reflector(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The judgement of one chunk of new frames."""
    batch, chunk = options.batch or config.post_training.starts * config.rollout.samples, config.policy.chunk
    machine = measure_machine(options.repeats, config.reflector.llava.language.dtype)
    starts = make_starts(config, batch)
    params = random_params(init_reflector, config.reflector, options.dtype)
    fns = make_reflector_fns(config.reflector)
    state = jax.jit(fns.init)(params, starts)
    frames = np.repeat(starts.images[:, None], chunk, axis=1)
    prediction = Prediction(frames, np.zeros((batch, chunk, 8), np.float32))
    program = compile_program(fns.judge, params, state, prediction)
    (seconds,) = median_seconds([lambda: program.call(*program.arguments)], options.repeats)
    return {
        "figure": "frames_per_second",
        "frames_per_second": batch * chunk / seconds,
        **figures(program, seconds, machine),
        "machine": machine,
        "shapes": {"frames": list(frames.shape)},
        "mode": config.reflector.mode,
    }


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
    frames = count * rollout.samples * rollout.num_chunks * config.policy.chunk
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


def benchmark_data(config: ExperimentConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Training windows per second, read from disk, decoded, stacked and prefetched by the loader."""
    batch = options.batch or config.denoiser.batch_size
    with tempfile.TemporaryDirectory() as scratch:
        written = lambda: write_episodes(
            Path(scratch) / "episodes", synthetic_episodes(config), encoding=options.encoding
        )
        folder = options.folder or written()
        episodes = open_episodes(folder)
        longest = max(len(episode.success) for episode in episodes)
        windows = {
            "policy": PolicyWindows(episodes, config.policy.chunk),
            "simulator": SimulatorWindows(
                episodes, lambda t: history_steps(t, config.simulator.history), config.simulator.chunk
            ),
            "reflector": ReflectorWindows(episodes, longest),
        }
        rates = {}
        for name, cuts in windows.items():
            batches = load_batches(BatchSampler(cuts, batch, seed=0), ahead=READ_AHEAD)
            for _ in range(READ_AHEAD):
                next(batches)
            began = time.perf_counter()
            for _ in range(READ_AHEAD * options.repeats):
                next(batches)
            rates[name] = READ_AHEAD * options.repeats * batch / (time.perf_counter() - began)
        shape = list(episodes[0].images.shape)
    return {
        "figure": "simulator_windows_per_second",
        **{f"{name}_windows_per_second": rate for name, rate in rates.items()},
        "shapes": {"batch": batch, "episodes": len(episodes), "episode_images": shape},
        "source": str(options.folder or f"synthetic episodes, {options.encoding}"),
    }


def synthetic_episodes(config: ExperimentConfig, count: int = 16, steps: int = 48) -> list[Episode]:
    """Episodes of a square that moves over a shaded ground; every second one succeeds."""
    views, (height, width) = config.simulator.views, config.simulator.image_size
    shade = np.linspace(60, 200, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    episodes = []
    for seed in range(count):
        images = np.tile(shade, (steps + 1, views, 1, 1, 1))
        for t in range(steps + 1):
            left = (t + 3 * seed) % (width - width // 8)
            images[t, :, height // 3 : height // 2, left : left + width // 8] = (200, 40, 40)
        episodes.append(
            Episode(
                images=images,
                proprio=np.zeros((steps + 1, 8), np.float32),
                actions=np.zeros((steps, 7), np.float32),
                success=(np.arange(steps + 1) > steps - 4) & (seed % 2 == 0),
                intrinsics=np.tile(np.eye(3, dtype=np.float32), (steps + 1, views, 1, 1)),
                camera_pose=np.tile(np.eye(4, dtype=np.float32), (steps + 1, views, 1, 1)),
                instruction="move the square",
                task=0,
                seed=seed,
                split="train",
                starts="shifted",
                actor="expert",
            )
        )
    return episodes


BENCHMARKS = {
    "machine": benchmark_machine,
    "rollout": benchmark_rollout,
    "policy": benchmark_policy,
    "simulator": benchmark_simulator,
    "reflector": benchmark_reflector,
    "data": benchmark_data,
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--config", default="tabletop", help=f"preset: {', '.join(PRESETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override; repeatable")
    parser.add_argument("--batch", type=int, help="rows; by default those of the preset's post-training")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
    parser.add_argument("--folder", type=Path, help="data: an RLDS folder instead of synthetic episodes")
    parser.add_argument("--encoding", default="png", choices=IMAGE_ENCODINGS, help="data: of the synthetic episodes")
    return parser.parse_args()


def main() -> None:
    """Prints the JSON line."""
    options = parse_arguments()
    if options.repeats < 1 or (options.batch is not None and options.batch < 1):
        raise WorldEnvError("--repeats and --batch must be at least 1")
    jax.config.update("jax_enable_compilation_cache", False)
    config = apply_overrides(get_config(options.config), options.set)
    result = BENCHMARKS[options.benchmark](config, options)
    device = jax.devices()[0]
    device_peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    line = {
        "benchmark": options.benchmark,
        "config": options.config,
        "overrides": options.set,
        **result,
        "repeats": options.repeats,
        "param_dtype": options.dtype,
        "device_peak_bytes": device_peak,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} host cores",
        "jax": jax.__version__,
        "commit": git_commit(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_main(main)
