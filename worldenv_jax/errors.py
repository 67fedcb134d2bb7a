# SPDX-License-Identifier: Apache-2.0
"""The error a user can act on, and the wrapper that turns it into one line and an exit code."""

import sys
from collections.abc import Callable


class WorldEnvError(Exception):
    """An error that the user can correct: one clear message, shown without a traceback by `run_main`."""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and leaves the process with its exit code.

    Args:
        main: takes nothing; returns the exit code, or None for 0.

    Exit codes: 2 after a `WorldEnvError` (printed as one line, `error: …`), 130 after Ctrl-C. Any other exception is
    a defect of the program and keeps its traceback.
    """
    try:
        code = main() or 0
    except WorldEnvError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
