# SPDX-License-Identifier: Apache-2.0
"""Comparisons with the numbers of reference implementations, one module per reference.

Each module has `check(fixture: Path) -> Iterator[Result]`: it loads a folder of the fixture format, reads every size
from it, and yields one `Result` per quantity found there. A quantity it does not know has tolerance None.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """One compared quantity."""

    name: str
    error: float  # maximum absolute difference; infinite where shapes differ
    tolerance: float | None  # None: a quantity in the fixture that the check does not know

    @property
    def passed(self) -> bool:
        """Within tolerance; an unknown quantity and a NaN never pass."""
        return self.tolerance is not None and self.error <= self.tolerance


def compare(name: str, ours, reference, tolerance: float) -> Result:
    """The maximum absolute difference, computed in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        return Result(f"{name} (got shape {ours.shape}, reference {reference.shape})", np.inf, tolerance)
    return Result(name, float(np.max(np.abs(ours - reference), initial=0.0)), tolerance)


def unknown(name: str) -> Result:
    """A quantity in the fixture that the check does not know: always a failure."""
    return Result(name, np.nan, None)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, without pickled objects."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}
