# SPDX-License-Identifier: Apache-2.0
"""The errors of everything that reads or writes data."""

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


class MalformedExampleError(WorldEnvError, ValueError):
    """Bytes that are no `tf.train.Example`; whoever knows the file turns it into a `DataError`."""
