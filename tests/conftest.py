# SPDX-License-Identifier: Apache-2.0
"""Settings every test needs: simulated devices, the compilation cache, the folder of reference fixtures."""

import gc
import os
from pathlib import Path

# Before jax is imported. Eight simulated devices dead-lock on fewer than eight host threads without PJRT_NPROC.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes millions of small objects: by default an eighth of all time goes into looking for cycles among them.
gc.set_threshold(200_000, 20, 20)
# Files that take minutes; begun first, so that no process is left with one at the end.
LONGEST = ("experiments/test_scripts.py", "devices/test_models_devices.py", "training/test_pretrained.py")


def pytest_collection_modifyitems(items):
    """The longest files first; the order is kept by `--no-loadscope-reorder`."""
    rank = lambda item: next((i for i, name in enumerate(LONGEST) if str(item.path).endswith(name)), len(LONGEST))
    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference numbers beside the checkout; a user's clone does not have it."""
    folder = ROOT.parent / "shared"
    if not (folder / "fixtures").is_dir():
        pytest.skip("no reference fixtures beside this checkout (../shared/fixtures)")
    return folder


@pytest.fixture(scope="session")
def fixtures_dir(shared_dir) -> Path:
    """`../shared/fixtures`."""
    return shared_dir / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Compiled programs are dropped at the end of a file; all of them together would take several GB per process."""
    yield
    jax.clear_caches()
    gc.collect()
