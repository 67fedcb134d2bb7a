# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzing tool: damaged inputs end in data or in the project's errors."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"


def test_three_hundred_inputs_of_every_reader():
    result = subprocess.run([sys.executable, TOOL, "--inputs=300"], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["target"] for row in rows] == ["tfrecord", "torch_file", "overrides", "safetensors"]
    assert all(row["accepted"] and row["refused"] and not row["surprises"] for row in rows)
