# SPDX-License-Identifier: Apache-2.0
"""Calls the experiment scripts through their real main, for tests."""

import importlib
import sys
from pathlib import Path

from absl import flags
from absl.testing import flagsaver

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def run(script: str, workdir: Path, *arguments: str):
    """Imports a script and calls its main with these flags.

    The flags are set one by one: tools imported by other tests have required flags, which parsing would ask for.
    """
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    module = importlib.import_module(script)
    values = {"config": "debug", "workdir": str(workdir), "set": []}
    for argument in arguments:
        name, separator, text = argument.removeprefix("--").partition("=")
        if name == "set":
            values["set"].append(text)
        else:
            values[name] = flags.FLAGS[name].parser.parse(text) if separator else True
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        return module.main()
