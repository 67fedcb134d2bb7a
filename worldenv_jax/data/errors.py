# SPDX-License-Identifier: Apache-2.0
"""The error of everything that reads or writes data: it names the file."""

from pathlib import Path

from worldenv_jax.errors import WorldEnvError


class DataError(WorldEnvError, ValueError):
    """A file or folder cannot be used as it is.

    Attributes:
        path: the file or folder.
    """

    def __init__(self, path: Path | str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)
