# SPDX-License-Identifier: Apache-2.0
"""Compiles post-training for a TPU pod on a machine without one, and prints what it needs.

    pip install libtpu                      # the TPU compiler; no TPU is needed
    python tools/compile_for_topology.py --preset=libero_full --topology=v5e:8x8

For the update and the rollout it tries layouts (data, fsdp, tensor) from the cheapest in communication on, and stops
at the first that fits a device's memory. Each row: bytes per device (arguments, temporaries, outputs), FLOPs of all
devices together (scan bodies multiplied by their length), collectives and their bytes per device (loop bodies
multiplied by their trip count). `beside` are the bytes of what only the other program reads and stays on the device
meanwhile: frozen models, optimiser state. `gradients` are those of the trained parameters, once: what an update has to
send at the least. Arrays above 64 MiB that every device holds whole are named.

    --plan=plan.jsonl       adds the rows to a file and prints the Markdown table of the whole file at the end
    --memory-gb=80          another device's memory; with --topology=v5p:2x2x2 the plan for eight 80 GB GPUs, as far as
                            the TPU compiler's buffers tell (there is no compiler for GPUs without one)

    --shapes="1,8,1;1,64,1" bytes per device of the update's arguments and results in these layouts from shapes alone
                            (`jax.eval_shape`), in seconds and without libtpu; temporaries are not known then

`JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1.0` in the environment shortens compilation; the bytes are then those of a less
optimised program.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud for its topology otherwise
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from tools.flops import jaxpr_flops  # noqa: E402
from worldenv_jax import mesh as meshes  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.loop_ppo import LoopConfig  # noqa: E402
from worldenv_jax.metrics import read_json_lines  # noqa: E402
from worldenv_jax.policy import (  # noqa: E402
    PolicyConfig,
    init_policy,
    laplace_log_prob,
    make_policy_fn,
    policy_distribution,
)
from worldenv_jax.reflector import ReflectorConfig, init_reflector, make_reflector_fns  # noqa: E402
from worldenv_jax.rollout import RolloutConfig, RolloutParams, imagine_rollout, repeat_starts  # noqa: E402
from worldenv_jax.simulator import Kinematics, SimulatorConfig, init_simulator, make_simulator_fns  # noqa: E402
from worldenv_jax.training.post_training import PostTrainingConfig, make_update  # noqa: E402
from worldenv_jax.training.train_state import (  # noqa: E402
    OptimizerConfig,
    init_train_state,
    partition,
    trainable_mask,
)
from worldenv_jax.types import Camera, Observation, Rollout, Starts, Statistics, Text  # noqa: E402

GIB = 2**30
MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}  # per device; TPU system architecture pages
LARGE = 64 * 2**20  # bytes from which a replicated array is worth a warning


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="libero_full", help="classmethod of the three model configs")
    parser.add_argument("--topology", default="v5e:8x8", help="v5e:8x8, v5p:4x4x4, v6e:8x8, ...")
    parser.add_argument("--starts", type=int, default=8, help="S")
    parser.add_argument("--samples", type=int, default=8, help="G")
    parser.add_argument("--chunks", type=int, default=38, help="T; 38 chunks of 8 are LIBERO's 300 steps")
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--chunks-at-once", type=int, default=1, help="of a trajectory in the update; 0: all")
    parser.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation")
    parser.add_argument("--layouts", default="", help="data,fsdp,tensor;... instead of the built-in order")
    parser.add_argument("--programs", default="update,rollout")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="of a device, 10^9 bytes; 0: the topology's")
    parser.add_argument("--shapes", default="", help="data,fsdp,tensor;...: compile nothing")
    parser.add_argument("--plan", type=Path, help="JSON lines; the rows are added")
    return parser.parse_args()


class Plan:
    """The abstract inputs of one experiment, and its two programs."""

    def __init__(self, arguments: argparse.Namespace):
        self.samples, self.starts_count, self.chunks = arguments.samples, arguments.starts, arguments.chunks
        self.policy = getattr(PolicyConfig, arguments.preset)()
        # All three see the policy's cameras; those after the first move with the hand.
        views, hand_views = self.policy.views, tuple(range(1, self.policy.views))
        simulator = getattr(SimulatorConfig, arguments.preset)()
        self.simulator = dataclasses.replace(simulator, views=views, hand_views=hand_views)
        self.reflector = dataclasses.replace(getattr(ReflectorConfig, arguments.preset)(), views=views)
        trainable = ("^lora/", "head") if self.policy.lora_rank else ("",)
        self.optimizer = OptimizerConfig(trainable=trainable, micro_batches=arguments.micro_batches)
        self.training = PostTrainingConfig(
            minibatches=arguments.minibatches, chunks_at_once=arguments.chunks_at_once, optimizer=self.optimizer
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.starts_count * self.samples

    def update(self, statistics: Statistics, state: Any, key: Any, rollout: Rollout) -> Any:
        """The LOOP-PPO update of one iteration."""
        distribution = functools.partial(policy_distribution, self.policy)
        read = lambda params, observation: distribution(params, statistics, observation)
        return make_update(read, laplace_log_prob, self.training, LoopConfig(), self.samples)(state, key, rollout)

    def rollout(self, statistics: Statistics, params: RolloutParams, key: Any, starts: Starts) -> Rollout:
        """One imagined batch."""
        simulator = make_simulator_fns(self.simulator, statistics, Kinematics.osc_pose())
        policy, reflector = make_policy_fn(self.policy, statistics), make_reflector_fns(self.reflector)
        starts = meshes.constrain_batch(repeat_starts(starts, self.samples))
        config = RolloutConfig(num_chunks=self.chunks, samples=1)
        return imagine_rollout(policy, simulator, reflector, params, key, starts, config)

    def arguments_of(self, program: str, mesh: meshes.Mesh) -> tuple[Any, ...]:
        """Abstract, sharded arguments of "update" or "rollout": frozen parameters bfloat16, trained ones float32."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        statistics = Statistics(_f32(7), _f32(7), _f32(8), _f32(8))
        policy = self._half(
            jax.eval_shape(lambda: init_policy(self.policy, jax.random.key(0))), self.optimizer.trainable
        )
        place = lambda tree: meshes.abstract_state(tree, mesh)
        if program == "update":
            state = jax.eval_shape(lambda p: init_train_state(p, self.optimizer, jax.random.key(0)), policy)
            return place(statistics), place(state), place(key), _split(self.abstract_rollout(), mesh)
        simulator = jax.eval_shape(lambda: init_simulator(self.simulator, jax.random.key(0)))
        reflector = jax.eval_shape(lambda: init_reflector(self.reflector, jax.random.key(0)))
        params = RolloutParams(policy, self._half(simulator), self._half(reflector))
        return place(statistics), place(params), place(key), _split(self.abstract_starts(), mesh)

    def abstract_starts(self) -> Starts:
        """S starts."""
        count, views = self.starts_count, self.policy.views
        height, width = self.simulator.image_size
        text = lambda length: Text(_array(jnp.int32, count, length), _array(bool, count, length))
        return Starts(
            images=_array(jnp.uint8, count, views, height, width, 3),
            proprio=_f32(count, 8),
            policy_text=text(self.policy.text_length),
            reflector_text=text(self.reflector.text_length),
            camera=Camera(_f32(count, views, 3, 3), _f32(count, views, 4, 4)),
            task=_array(jnp.int32, count),
            photographs=_array(jnp.uint8, count, *self.simulator.photographs_shape),
        )

    def abstract_rollout(self) -> Rollout:
        """B trajectories."""
        b, t, k, a = self.batch, self.chunks, self.policy.chunk, self.policy.action_dim
        image = (self.policy.views, *self.simulator.image_size, 3)
        text = Text(_array(jnp.int32, b, self.policy.text_length), _array(bool, b, self.policy.text_length))
        return Rollout(
            observations=Observation(_array(jnp.uint8, b, t, *image), _f32(b, t, 8), text),
            actions=_f32(b, t, k, a),
            log_prob=_f32(b, t, k),
            loc=_f32(b, t, k, a),
            log_scale=_f32(b, t, k, a),
            frames=_array(jnp.uint8, b, t, k, *image),
            proprio=_f32(b, t, k, 8),
            success_probability=_f32(b, t, k),
            valid=_array(bool, b, t, k),
            reward=_f32(b),
            terminated=_array(bool, b),
            length=_array(jnp.int32, b),
        )

    @staticmethod
    def _half(params: Any, trainable: tuple[str, ...] = ()) -> Any:
        mask = trainable_mask(params, trainable)
        dtype = lambda leaf, trained: leaf.dtype if trained else jnp.bfloat16
        return jax.tree.map(lambda leaf, trained: _array(dtype(leaf, trained), *leaf.shape), params, mask)


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(jnp.float32, *shape)


def _split(tree: Any, mesh: meshes.Mesh) -> Any:
    """The leading axis over data and fsdp where it divides (a rollout's rows do, a few starts may not)."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def split(leaf):
        spec = meshes.BATCH if leaf.shape[0] % parts == 0 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(split, tree)


def layouts(devices: int, batch: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) from pure data parallelism to more and more splitting of the parameters."""
    for tensor in (1, 2, 4, 8):
        for fsdp in (1, 2, 4, 8, 16, 32, 64):
            data = devices // (fsdp * tensor)
            if data * fsdp * tensor == devices and batch % (data * fsdp) == 0:
                yield data, fsdp, tensor


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def count_collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Kind -> (executions, bytes of their results) on one device, loop bodies times their known trip count."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$", line)
        if header and not line.startswith(" "):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)

    @functools.cache
    def count(name: str) -> collections.Counter:
        totals: collections.Counter = collections.Counter()
        for line in computations.get(name, ()):
            kind = re.search(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", line)
            if kind:
                totals[kind[1], "n"] += 1
                totals[kind[1], "bytes"] += _result_bytes(line[: kind.start()])
            times = _trip_count(line, computations)
            callees = re.findall(r"(?:body|calls|to_apply|async_computation)=%?([\w.\-]+)", line)
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            callees += re.findall(r"[\w.\-]+", branches[1]) if branches else []
            callees += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
            for callee in callees:
                for key, value in count(callee).items():
                    totals[key] += times * value
        return totals

    totals = count(entry)
    return {kind: (totals[kind, "n"], totals[kind, "bytes"]) for kind in _COLLECTIVES if totals[kind, "n"]}


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """How often a `while` runs: as annotated, or else the constant N of its condition "counter < N"; 1 if unknown."""
    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
    if trips or not condition:
        return int(trips[1]) if trips else 1
    body = "\n".join(computations.get(condition[1], ()))
    limits = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", body)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in body else 1


def _result_bytes(text: str) -> int:
    """Bytes of the largest array type in an instruction's result (a `-start` also lists its operand)."""
    sizes = [
        _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
        if dtype in _BYTES
    ]
    return max(sizes, default=0)


def compile_program(function: Callable, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Bytes, FLOPs and collectives of a compiled program; {"error": ...} where the compiler gives up."""
    began = time.monotonic()
    lowered = jax.jit(function).trace(*arguments)
    flops = jaxpr_flops(lowered.jaxpr.jaxpr)
    try:
        compiled = lowered.lower().compile()
    except Exception as error:  # XLA reports "does not fit" as a runtime error
        return {"error": str(error).strip().splitlines()[0][:300], "flops": flops}
    memory = compiled.memory_analysis()
    return {
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "output_gib": round(memory.output_size_in_bytes / GIB, 3),
        "peak_gib": round(
            (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes) / GIB, 3
        ),
        "flops": flops,
        "collectives": {
            kind: {"count": count, "gib": round(size / GIB, 3)}
            for kind, (count, size) in count_collectives(compiled.as_text()).items()
        },
        "compile_seconds": round(time.monotonic() - began, 1),
    }


def beside(plan: Plan, program: str, mesh: meshes.Mesh) -> int:
    """Bytes per device of what only the other program reads."""
    if program == "update":
        params = plan.arguments_of("rollout", mesh)[1]
        only = (params.simulator, params.reflector)
    else:
        only = plan.arguments_of("update", mesh)[1].opt_state
    return sum(placement.bytes_per_device for placement in meshes.place(only, mesh))


def gradient_bytes(plan: Plan, mesh: meshes.Mesh) -> int:
    """Of the trained parameters, what a device holds of them."""
    params = plan.arguments_of("update", mesh)[1].params
    trained, _ = partition(params, trainable_mask(params, plan.optimizer.trainable))
    return sum(placement.bytes_per_device for placement in meshes.place(trained, mesh))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: GiB per device."""
    head = ("program", "devices", "data x fsdp x tensor", "arguments", "temporaries", "outputs", "beside",
            "collectives", "gradients", "fits")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        number = lambda key: f"{row[key]:.2f}" if key in row else ""  # noqa: B023
        needs = re.search(r"(?:\(|Used )([\d.]+)G(?:\) exceeds| of )", row.get("error", ""))
        sizes = [number(f"{key}_gib") for key in ("argument", "temporary", "output", "beside")]
        sent = sum(kind["gib"] for kind in row.get("collectives", {}).values())
        devices = f"{row['topology']}, {row['memory_gib']:.1f} GiB"
        cells = (row["program"], devices, " x ".join(map(str, row["layout"])), *sizes,
                 f"{sent:.1f}" if "collectives" in row else "", number("gradients_gib"),
                 "yes" if row["fits"] else f"no, needs {needs[1]}" if needs else "no")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replicated(arguments: tuple[Any, ...]) -> list[str]:
    """Names of the large arrays that every device would hold whole."""
    leaves = jax.tree_util.tree_flatten_with_path(arguments)[0]
    whole = lambda leaf: leaf.sharding.is_fully_replicated and leaf.size * leaf.dtype.itemsize > LARGE
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if whole(leaf)]


def parse_layouts(text: str) -> list[tuple[int, int, int]]:
    """`1,8,1;1,64,1` -> [(1, 8, 1), (1, 64, 1)]."""
    return [tuple(map(int, layout.split(","))) for layout in text.split(";") if layout]


def update_shapes(plan: Plan, layout: tuple[int, int, int]) -> dict[str, Any]:
    """GiB per device of the update's arguments and results."""
    mesh = meshes.make_mesh(*layout, devices=jax.devices("cpu")[: math.prod(layout)])
    statistics, state, key, rollout = plan.arguments_of("update", mesh)
    with jax.set_mesh(mesh):
        new_state, metrics = jax.eval_shape(plan.update, statistics, state, key, rollout)
    placed = lambda tree: sum(placement.bytes_per_device for placement in meshes.place(tree, mesh)) / GIB
    rows = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(rollout)) / GIB
    sizes = {"parameters": placed(state.params), "optimizer": placed(state.opt_state), "rollout": rows}
    sizes |= {"results": placed((new_state, metrics)), "gradients": gradient_bytes(plan, mesh) / GIB}
    return {"program": "update", "layout": layout} | {f"{name}_gib": round(size, 3) for name, size in sizes.items()}


def main() -> int:
    arguments = parse_arguments()
    if shapes := parse_layouts(arguments.shapes):
        jax.config.update("jax_num_cpu_devices", max(map(math.prod, shapes)))
        plan = Plan(arguments)
        for layout in shapes:
            print(json.dumps(update_shapes(plan, layout)), flush=True)
        return 0
    generation = arguments.topology.partition(":")[0]
    if generation not in MEMORY:
        raise WorldEnvError(f"unknown topology {arguments.topology!r}: it starts with one of {', '.join(MEMORY)}")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    memory = arguments.memory_gb * 1e9 or MEMORY[generation]
    plan, rows = Plan(arguments), []
    chosen = parse_layouts(arguments.layouts)
    fits_all = True
    for program in arguments.programs.split(","):
        fits = False
        for layout in chosen or layouts(len(devices), plan.batch):
            mesh = meshes.make_mesh(*layout, devices=devices)
            inputs = plan.arguments_of(program, mesh)
            resident = sum(p.bytes_per_device for p in meshes.place(inputs[1], mesh))
            row: dict[str, Any] = {"topology": arguments.topology, "program": program, "layout": layout}
            row |= {"memory_gib": memory / GIB, "beside_gib": beside(plan, program, mesh) / GIB}
            if program == "update":
                row["gradients_gib"] = gradient_bytes(plan, mesh) / GIB
            if resident > memory:
                row |= {"fits": False, "error": f"the parameters alone take {resident / GIB:.1f} GiB per device"}
            else:
                with jax.set_mesh(mesh):
                    row |= compile_program(getattr(plan, program), inputs)
                used = row["beside_gib"] + row.get("peak_gib", math.inf)
                row |= {"fits": used * GIB <= memory, "replicated": replicated(inputs)}
            print(json.dumps(row), flush=True)
            rows.append(row)
            if row["fits"]:
                fits = True
                break
        fits_all &= fits
    if arguments.plan:
        with arguments.plan.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        rows = read_json_lines(arguments.plan)
    print(table(rows))
    return int(not fits_all)


if __name__ == "__main__":
    run_main(main)
