# SPDX-License-Identifier: Apache-2.0
"""Kills a training command again and again and checks that resuming loses nothing.

    python tools/fault_run.py --kills=200 --folder=runs/faults -- python tests/training/debug_run.py WORKDIR 12

The command runs once undisturbed; then it is started and SIGKILLed at random moments (WORKDIR stands for its folder;
a run that comes to its end is begun again in a new one) until the kills are done, and is left to finish. All runs must
end with the same parameters and the same recorded episodes byte for byte, every checkpoint on the way must be readable,
and no process may be left. Prints one JSON line after every tenth kill and at the end; the exit code is 1 if anything
differs. The example collects demonstrations and clones on the debug preset; `tests/training/tiny_run.py WORKDIR 400
0.02` in its place tries checkpoints and little else, in less time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from worldenv_jax.checkpoints import load_params
from worldenv_jax.errors import WorldEnvError, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("command", nargs="+", help="WORKDIR in it is replaced by a run's folder")
    return parser.parse_args()


def start(command: list[str], workdir: Path) -> subprocess.Popen:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "output.log").open("a") as log:
        replaced = [part.replace("WORKDIR", str(workdir)) for part in command]
        return subprocess.Popen(replaced, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    if process.wait() != 0:
        tail = (workdir / "output.log").read_text()[-1000:]
        raise WorldEnvError(f"the command failed in {workdir} with exit code {process.returncode}: {tail}")


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


def main() -> int:
    arguments = parse_arguments()
    if arguments.folder.exists():
        raise WorldEnvError(f"{arguments.folder} exists: name a new folder")
    began = time.monotonic()
    straight = arguments.folder / "straight"
    finish(start(arguments.command, straight), straight)  # with everything to compile: the next is timed
    shutil.rmtree(straight)
    began = time.monotonic()
    finish(start(arguments.command, straight), straight)
    expected, duration = final_parameters(straight), time.monotonic() - began

    chance = random.Random(arguments.seed)
    kills, orphans, runs = 0, 0, [arguments.folder / "killed0"]
    while kills < arguments.kills:
        process = start(arguments.command, runs[-1])
        try:
            finished = process.wait(timeout=chance.uniform(0.2, 1.0) * duration) is not None
        except subprocess.TimeoutExpired:
            finished = False
        if finished:
            finish(process, runs[-1])
            runs.append(arguments.folder / f"killed{len(runs)}")
            continue
        process.kill()
        process.wait()
        kills += 1
        orphans += has_orphans(process)
        if kills % 10 == 0:
            print(json.dumps({"kills": kills, "runs": len(runs), "orphan_processes": orphans}), flush=True)
    finish(start(arguments.command, runs[-1]), runs[-1])

    logs = "".join((run / "output.log").read_text() for run in runs)
    result = {
        "kills": kills,
        "runs": len(runs),
        "runs_with_other_parameters": sum(not is_same(final_parameters(run), expected) for run in runs),
        "runs_with_other_episodes": sum(episodes(run) != episodes(straight) for run in runs),
        "unreadable_checkpoints": logs.count("is unreadable"),
        "orphan_processes": orphans,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result))
    return int(any(value for key, value in result.items() if key not in ("kills", "runs", "seconds")))


if __name__ == "__main__":
    run_main(main)
