# SPDX-License-Identifier: Apache-2.0
"""Puts recordings of one's own robot into a workdir, ready for training; see README.md, "Your own robot".

    python tools/import_recordings.py --folder=my_robot --workdir=runs/my_robot --config=tabletop \
        --set=environment.name=recorded
    python experiments/clone_policy.py --workdir=runs/my_robot --config=tabletop --set=environment.name=recorded

The layout of the folder is described in `worldenv_jax/data/recordings.py`. What is written are RLDS folders
(`data/demonstrations`, `data/exploration`), the statistics and the instructions.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worldenv_jax.configs import get_config  # noqa: E402
from worldenv_jax.data.recordings import KINDS, read_recordings  # noqa: E402
from worldenv_jax.data.rlds import add_episodes  # noqa: E402
from worldenv_jax.errors import WorldEnvError, run_main  # noqa: E402
from worldenv_jax.overrides import apply_overrides, to_dict  # noqa: E402
from worldenv_jax.training.collecting import calibrate_workdir  # noqa: E402
from worldenv_jax.training.workdir import Workdir  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    """Imports one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the recordings")
    parser.add_argument("--workdir", type=Path, required=True, help="of the run that they are for")
    parser.add_argument("--config", default="tabletop", help="preset of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override; repeatable")
    options = parser.parse_args(arguments)
    config = apply_overrides(get_config(options.config), options.set)
    if config.environment.name != "recorded":
        raise WorldEnvError("recordings come without a world: pass --set=environment.name=recorded")
    data = options.workdir / "data"
    if data.exists():
        raise WorldEnvError(f"{data} exists already: choose another --workdir")
    sizes = config.environment
    episodes = list(read_recordings(options.folder, sizes.image_size, sizes.photograph_size))
    kinds = {kind: [episode for each, episode in episodes if each == kind] for kind in KINDS}
    if not kinds["demonstration"]:
        raise WorldEnvError(f"{options.folder}: no row of steps.csv has the kind {KINDS[0]!r}; nothing to clone from")
    views = episodes[0][1].images.shape[1]
    if views != config.simulator.views:
        raise WorldEnvError(f"the recordings have {views} cameras, the config's models look through a different number")
    workdir = Workdir(options.workdir, to_dict(config))
    add_episodes(data / "demonstrations", kinds["demonstration"])
    if kinds["exploration"]:
        add_episodes(data / "exploration", kinds["exploration"])
    calibrate_workdir(workdir, config.pretrained)
    instructions = {episode.task: episode.instruction for _, episode in episodes}
    workdir.calibrate(instructions=[instructions[task] for task in sorted(instructions)])
    for kind, found in kinds.items():
        print(f"{kind}: {len(found)} episodes, {sum(episode.succeeded for episode in found)} successful")


if __name__ == "__main__":
    run_main(main)
