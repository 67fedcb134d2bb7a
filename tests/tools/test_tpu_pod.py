# SPDX-License-Identifier: Apache-2.0
"""The pod launcher, with a stand-in for gcloud that prints its arguments."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "tpu_pod.sh"
POD = {"TPU_NAME": "pod", "ZONE": "zone"}


def launch(folder, *command, **environment):
    for name in ("bash", "env"):
        if not (folder / name).exists():
            (folder / name).symlink_to(f"/usr/bin/{name}")
    return subprocess.run(
        [SCRIPT, *command], env={"PATH": str(folder), **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [({}, "TPU_NAME is not set"), ({"TPU_NAME": "pod"}, "ZONE is not set"), (POD, "gcloud is not on the PATH")],
)
def test_says_what_is_missing(tmp_path, environment, message):
    result = launch(tmp_path, "true", **environment)
    assert result.returncode == 2 and message in result.stderr


def test_command_reaches_every_host_as_it_was_written(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    result = launch(tmp_path, "python", "run.py", "--set=a=[1, 2]", PROJECT="project", **POD)
    assert result.returncode == 0, result.stderr
    *options, command = result.stdout.splitlines()
    wanted = "compute tpus tpu-vm ssh pod --zone zone --project project --worker all --command"
    assert " ".join(options) == wanted
    assert command == r"cd worldenv_jax && python run.py --set=a=\[1\,\ 2\] "
