# SPDX-License-Identifier: Apache-2.0
"""Compares this library with numbers computed by a reference implementation.

    python tools/check_parity.py --reference=openvla_oft --fixture=../shared/fixtures/openvla_oft

Prints one line per quantity: name, maximum absolute error, tolerance, pass or FAIL. Exits 1 where a quantity misses
its tolerance, where the fixture holds a quantity that the check does not know, or where it holds none. Runs in
float32 with the highest matmul precision. Needs no PyTorch and no TensorFlow.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
from absl import app, flags  # noqa: E402

REFERENCES = ["openvla_oft", "evac", "llava", "images", "rlds"]
_REFERENCE = flags.DEFINE_enum("reference", None, REFERENCES, "The reference implementation.", required=True)
_FIXTURE = flags.DEFINE_string("fixture", None, "Folder of inputs, weights and outputs.", required=True)


def main(_: list[str]) -> int:
    """Runs the chosen comparison."""
    folder = Path(_FIXTURE.value)
    if not folder.is_dir():
        print(f"error: --fixture={folder} is not a folder", file=sys.stderr)
        return 2
    reference = importlib.import_module(f"tools.parity.{_REFERENCE.value}")
    results = []
    with jax.default_matmul_precision("highest"):
        for result in reference.check(folder):
            results.append(result)
            tolerance = "unknown" if result.tolerance is None else f"{result.tolerance:.1e}"
            verdict = "pass" if result.passed else "FAIL"
            print(f"{result.name:44s} {result.error:10.3e} {tolerance:>8s} {verdict}", flush=True)
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} quantities pass")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    app.run(main)
