# SPDX-License-Identifier: Apache-2.0
"""Disturbs a training command again and again and checks that resuming loses nothing.

    python tools/fault_run.py --count=200 --folder=runs/faults -- python tests/training/debug_run.py WORKDIR 12
    python tools/fault_run.py --count=20 --fault=truncate --folder=runs/faults -- ...
    python tools/fault_run.py --count=20 --fault=full --folder=/mnt/small/faults -- ...

The command runs once undisturbed; then it is started and disturbed at random moments (WORKDIR stands for its folder; a
run that comes to its end is begun again in a new one) until there have been enough faults, and is left to finish:

    kill      SIGKILL.
    truncate  SIGKILL, and the largest file of the newest checkpoint loses its second half. The resumed run has to say
              so and to go on from the one before.
    full      The file system of --folder, a small one, is full until the command has ended, which it has to do with
              an error of one line (TensorStore's threads may print more).

All runs must end with the same parameters and the same recorded episodes byte for byte, every checkpoint that was not
truncated must be readable, and no process may be left. Prints one JSON line after every tenth fault and at the end; the
exit code is 1 if anything differs. The example collects demonstrations and clones on the debug preset;
`tests/training/tiny_run.py WORKDIR 400 0.02` in its place tries checkpoints and little else, in less time.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from worldenv_jax.checkpoints import load_params
from worldenv_jax.errors import WorldEnvError, run_main

MAX_FREE = 1 << 30  # bytes
PATIENCE = 300  # seconds for a command to notice that the disk is full


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="faults in all")
    parser.add_argument("--fault", choices=("kill", "truncate", "full"), default="kill")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults")
    parser.add_argument("command", nargs="+", help="WORKDIR in it is replaced by a run's folder")
    return parser.parse_args()


def start(command: list[str], workdir: Path, log: Path) -> subprocess.Popen:
    with log.open("a") as output:
        replaced = [part.replace("WORKDIR", str(workdir)) for part in command]
        return subprocess.Popen(replaced, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    if process.wait() != 0:
        raise WorldEnvError(f"the command failed with exit code {process.returncode}: {log.read_text()[-1000:]}")


def _is_whole(step: Path) -> bool:
    """Whether this is a checkpoint, and not one that was being deleted."""
    sums = step / "checksums.json"
    return (
        step.name.isdigit() and sums.exists() and all((step / name).exists() for name in json.loads(sums.read_text()))
    )


def truncate_newest(workdir: Path, truncated: set[int]) -> bool:
    """Cuts the largest file of a newest checkpoint that is not the only one; False where there is none such.

    `truncated`: inodes of the checkpoints that have been cut; none is cut again before it has been read.
    """
    for last in workdir.rglob("last"):
        steps = sorted((path for path in last.iterdir() if _is_whole(path)), key=lambda path: int(path.name))
        if len(steps) > 1:
            newest = steps[-1]
            if newest.stat().st_ino not in truncated:
                largest = max(
                    (file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
                )
                os.truncate(largest, largest.stat().st_size // 2)
                truncated.add(newest.stat().st_ino)
                return True
    return False


def fill(folder: Path) -> Path:
    """Takes all free space of a small file system; returns the file to delete."""
    if shutil.disk_usage(folder).free > MAX_FREE:
        raise WorldEnvError(f"{folder} has more than {MAX_FREE >> 20} MiB free: --fault=full wants a small file system")
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return ballast


def has_orphans(process: subprocess.Popen) -> bool:
    """Whether the dead process's session still has a living member shortly after; ends them."""
    time.sleep(0.3)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def final_parameters(workdir: Path) -> list[np.ndarray]:
    """The last parameters of every checkpoint folder below a workdir, in one order."""
    folders = sorted(path.parent for path in workdir.rglob("last") if path.is_dir() and any(path.iterdir()))
    if not folders:
        raise WorldEnvError(f"no checkpoint below {workdir}")
    return [np.asarray(leaf) for folder in folders for leaf in jax.tree.leaves(load_params(folder, best=False)[0])]


def episodes(workdir: Path) -> dict[str, bytes]:
    """The files of the recorded datasets, without what a killed writer has left behind under a hidden name."""
    root = workdir / "data"
    files = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
    hidden = lambda name: any(part.startswith(".") for part in name.parts)
    return {str(name): path.read_bytes() for name, path in files.items() if not hidden(name)}


def is_same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b))


def disturb(process: subprocess.Popen, fault: str, workdir: Path, truncated: set[int]) -> bool:
    """Does it; returns whether it was one that counts."""
    if fault == "full":
        ballast = fill(workdir.parent)
        try:
            return process.wait(timeout=PATIENCE) != 0
        finally:
            ballast.unlink()
    process.kill()
    process.wait()
    return fault == "kill" or truncate_newest(workdir, truncated)


def main() -> int:
    arguments = parse_arguments()
    if arguments.folder.exists():
        raise WorldEnvError(f"{arguments.folder} exists: name a new folder")
    arguments.folder.mkdir(parents=True)
    logs = Path(tempfile.mkdtemp(prefix="fault_run"))  # not where the disk is full
    began = time.monotonic()
    straight = arguments.folder / "straight"
    for _ in range(2):  # once with everything to compile: the next is timed
        shutil.rmtree(straight, ignore_errors=True)
        begun = time.monotonic()
        finish(start(arguments.command, straight, logs / "straight"), logs / "straight")
    expected, duration = final_parameters(straight), time.monotonic() - begun

    chance = random.Random(arguments.seed)
    faults, orphans, unclear, truncated = 0, 0, 0, set()
    runs, log = [arguments.folder / "disturbed0"], logs / "disturbed"
    while faults < arguments.count:
        process, before = start(arguments.command, runs[-1], log), log.stat().st_size
        try:
            process.wait(timeout=chance.uniform(0.2, 1.0) * duration)
            finish(process, log)
            runs.append(arguments.folder / f"disturbed{len(runs)}")
            continue
        except subprocess.TimeoutExpired:
            counts = disturb(process, arguments.fault, runs[-1], truncated)
            faults += counts
            said = log.read_bytes()[before:]
            unclear += counts and arguments.fault == "full" and said.count(b"\nerror: ") != 1
        orphans += has_orphans(process)
        if faults and faults % 10 == 0:
            print(json.dumps({"faults": faults, "runs": len(runs), "orphan_processes": orphans}), flush=True)
    finish(start(arguments.command, runs[-1], log), log)

    unreadable = log.read_text().count("is unreadable")
    wrong = {
        "runs_with_other_parameters": sum(not is_same(final_parameters(run), expected) for run in runs),
        "runs_with_other_episodes": sum(episodes(run) != episodes(straight) for run in runs),
        "unreadable_checkpoints": unreadable - faults * (arguments.fault == "truncate"),
        "unclear_errors": unclear,
        "orphan_processes": orphans,
    }
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"fault": arguments.fault, "faults": faults, "runs": len(runs), **wrong, "seconds": seconds}))
    if any(wrong.values()):
        print(f"logs: {logs}")
        return 1
    shutil.rmtree(logs)
    return 0


if __name__ == "__main__":
    run_main(main)
