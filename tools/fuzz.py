# SPDX-License-Identifier: Apache-2.0
"""Feeds damaged inputs to everything that reads what others wrote, and fails on any surprise.

    python tools/fuzz.py --inputs=10000 [--targets=tfrecord,torch_file,overrides,safetensors] [--seed=0]

Each input is a good one with bytes overwritten, removed, repeated or inserted. A reader may return or raise
`WorldEnvError`; another exception, a hang of more than five seconds, more than 1 GiB of memory above the start, or a
change outside the target's own folder is a failure, shown with the input's number. One JSON line per target.
2,000 inputs of one target took 10 to 20 s on one busy core ("overrides" is the slowest).
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.data.example_proto import parse_example, serialize_example  # noqa: E402
from worldenv_jax.data.tfrecord import TFRecordFile, TFRecordWriter  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.overrides import apply_overrides  # noqa: E402
from worldenv_jax.weights.safetensors_files import INDEX, open_safetensors, save_safetensors  # noqa: E402
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file  # noqa: E402

LIMIT_SECONDS = 5
LIMIT_BYTES = 2**30
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.int64)}

# (folder, random) -> a function that reads one damaged input
Target = Callable[[Path, random.Random], Callable[[], None]]


class TooSlow(BaseException):
    """A reader that did not come to an end; no `except Exception` of the reader stops it."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="per target")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def damage(data: bytes, chance: random.Random) -> bytes:
    """One to four of: overwrite, remove, repeat, insert, cut off; small places mostly."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        stop = min(len(data), start + chance.choice((1, 1, 2, 4, 8, 64)))
        special = chance.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b"9", b"{", b"[", b'"', b"\xff\xff\xff\x7f"))
        kind = chance.randrange(6)
        if kind == 0:
            data[start:stop] = chance.randbytes(stop - start)
        elif kind == 1:
            del data[start:stop]
        elif kind == 2:
            data[start:start] = data[start:stop] * chance.randint(1, 20)
        elif kind == 3:
            data[start:start] = chance.randbytes(chance.randint(1, 9))
        elif kind == 4:
            data[start:stop] = special * (stop - start)
        elif chance.random() < 0.2:
            del data[start:]
    return bytes(data)


def fuzz_tfrecord(folder: Path, chance: random.Random) -> Callable[[], None]:
    """Half of the damage is to the framing, half to the example inside a record with right checksums."""
    file = folder / "episodes.tfrecord"
    example = serialize_example({"x": [b"ab", b""], "y": np.ones(3, np.float32), "z": np.arange(-2, 3)})
    inner = chance.random() < 0.5
    writer = TFRecordWriter(file)
    for _ in range(2):
        writer.write(damage(example, chance) if inner else example)
    writer.close()
    if not inner:
        file.write_bytes(damage(file.read_bytes(), chance))

    def read() -> None:
        records = TFRecordFile(file)
        for index in range(len(records)):
            parse_example(records[index])

    return read


def fuzz_torch_file(folder: Path, chance: random.Random) -> Callable[[], None]:
    """Half of the damage is to the archive, half to the pickle inside an intact archive."""
    file = folder / "weights.pt"
    save_torch_file(file, TENSORS)
    if chance.random() < 0.5:
        file.write_bytes(damage(file.read_bytes(), chance))
    else:
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, damage(data, chance) if name.endswith("data.pkl") else data)
    return lambda: load_torch_file(file)


OVERRIDES = (
    "post_training.iterations=40",
    'post_training.optimizer.group_learning_rates=[["lora", 1e-4]]',
    "simulator.autoencoder.multipliers=1,2,4",
    "policy.tokenizer=none",
    "policy.film=true",
    "denoiser.optimizer.schedule=cosine",
    "loop.clip=.2",
)


def fuzz_overrides(folder: Path, chance: random.Random) -> Callable[[], None]:
    """One setting, changed as text."""
    text = damage(chance.choice(OVERRIDES).encode(), chance).decode("utf-8", errors="replace")
    config = get_config("debug")
    return lambda: apply_overrides(config, [text])


def fuzz_safetensors(folder: Path, chance: random.Random) -> Callable[[], None]:
    """Damage to the index or to a shard."""
    shapes = {name: array.shape for name, array in TENSORS.items()}
    dtypes = {name: array.dtype.name for name, array in TENSORS.items()}
    names = {name: f"shard{number}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in names.items():
        save_safetensors(folder / file, {name: shapes[name]}, {name: dtypes[name]}, [(name, TENSORS[name])])
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 56}, "weight_map": names}))
    victim = folder / chance.choice((INDEX, INDEX, *names.values()))
    victim.write_bytes(damage(victim.read_bytes(), chance))

    def read() -> None:
        tensors = open_safetensors(folder)
        for name in tensors.shapes:
            tensors.read(name)

    return read


TARGETS: dict[str, Target] = {
    "tfrecord": fuzz_tfrecord,
    "torch_file": fuzz_torch_file,
    "overrides": fuzz_overrides,
    "safetensors": fuzz_safetensors,
}


def run_target(name: str, inputs: int, seed: int) -> dict[str, object]:
    """Counts of accepted, refused and surprising inputs, with the first surprises in words."""
    counts, surprises = {"accepted": 0, "refused": 0}, []
    began, before = time.monotonic(), _peak_bytes()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "inside"
        folder.mkdir()
        for number in range(inputs):
            read = TARGETS[name](folder, random.Random(f"{seed} {name} {number}"))
            try:
                signal.alarm(LIMIT_SECONDS)
                read()
                counts["accepted"] += 1
            except WorldEnvError:
                counts["refused"] += 1
            except (Exception, TooSlow) as error:  # what this program is for
                where = traceback.extract_tb(error.__traceback__)[-1]
                surprises.append(f"input {number}: {error!r:.200} at {Path(where.filename).name}:{where.lineno}")
            finally:
                signal.alarm(0)
        if [path.name for path in Path(root).iterdir()] != ["inside"]:
            surprises.append("files were written outside the folder")
    grown = _peak_bytes() - before
    if grown > LIMIT_BYTES:
        surprises.append(f"memory grew by {grown} bytes")
    seconds = round(time.monotonic() - began, 1)
    row = {"target": name, "inputs": inputs, **counts, "surprises": len(surprises), "seconds": seconds}
    return row | {"peak_growth_mib": grown >> 20, "first": surprises[:5]}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    arguments = parse_arguments()
    names = arguments.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        raise WorldEnvError(f"unknown targets {', '.join(unknown)}: there are {', '.join(TARGETS)}")

    def too_slow(*_: object) -> None:
        raise TooSlow(f"more than {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    failed = False
    for name in names:
        row = run_target(name, arguments.inputs, arguments.seed)
        print(json.dumps(row), flush=True)
        failed |= bool(row["surprises"])
    return int(failed)


if __name__ == "__main__":
    run_main(main)
