# SPDX-License-Identifier: Apache-2.0
"""What the LIBERO simulator needs around it: packages, assets, a GL library, its configuration file, initial states.

The simulator is `hf-libero` on robosuite 1.4 and MuJoCo. Three of its habits are put right here: it asks a question on
standard input when its configuration file is missing (so the file is written before the first import), it reads its
initial states with torch (so they are read here by an unpickler that allows NumPy arrays only), and its pictures and
contacts depend on the MuJoCo version (so versions are checked). Nothing in this file imports the simulator into the
calling process except `import_simulator`.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np

from worldenv_jax.errors import WorldEnvError

ASSETS_VARIABLE = "WORLDENV_LIBERO_ASSETS"
SETUP_COMMAND = "tools/setup_libero.sh"
_PACKAGES = {"hf-libero": "libero", "robosuite": "robosuite", "bddl": "bddl", "mujoco": "mujoco"}
_GL_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}

# Draws one frame; a GL library that is present but unusable often ends the process, so this runs in its own.
_GL_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 16, 16) as renderer:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer.update_scene(data)
    assert renderer.render().any()
"""


def package_folder() -> Path:
    """The folder of hf-libero's code, found without importing it.

    Raises:
      WorldEnvError: LIBERO or one of the packages it runs on is not installed.
    """
    missing = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise WorldEnvError(f"LIBERO needs {', '.join(missing)}, which cannot be imported; run {SETUP_COMMAND}")
    return Path(importlib.util.find_spec("libero").submodule_search_locations[0]) / "libero"


def assets_folder() -> Path:
    """The folder of meshes and textures: $WORLDENV_LIBERO_ASSETS, or `assets` beside hf-libero's code.

    Raises:
      WorldEnvError: there is none, or it is incomplete.
    """
    folder = Path(os.environ.get(ASSETS_VARIABLE) or package_folder() / "assets").expanduser()
    probes = ("scenes", "articulated_objects", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
    missing = [name for name in probes if not (folder / name).is_dir()]
    if missing:
        raise WorldEnvError(
            f"LIBERO's assets are missing: {folder} has no {', '.join(missing)}. Run {SETUP_COMMAND}, "
            f"or set {ASSETS_VARIABLE} to the folder that holds them"
        )
    return folder.resolve()


@functools.cache
def assets_fingerprint() -> str:
    """Eight hexadecimal digits over the names and sizes of all asset files: pictures differ where this differs."""
    folder = assets_folder()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:8]


def versions() -> dict[str, str]:
    """Versions of the packages that decide physics and pictures."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_versions() -> None:
    """Refuses MuJoCo versions that corrupt silently, warns of those that change contacts.

    Raises:
      WorldEnvError: MuJoCo before 3.1.6 together with NumPy 2 (its struct arrays alias: collision shapes are drawn).
    """
    mujoco = _version("mujoco")
    if mujoco < (3, 1, 6) and _version("numpy") >= (2,):
        raise WorldEnvError("MuJoCo before 3.1.6 draws wrong pictures with NumPy 2; pip install mujoco==3.3.2")
    if mujoco >= (3, 4, 0):
        warnings.warn(
            "MuJoCo 3.4 changed box-box contacts: libero_spatial task 5 starts differ from the published benchmark; "
            "pip install mujoco==3.3.2 for comparable scores",
            stacklevel=2,
        )


def _version(package: str) -> tuple[int, ...]:
    parts = importlib.metadata.version(package).split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


@functools.cache
def gl_backend() -> str:
    """The first GL library that draws a frame here: $MUJOCO_GL when set, else EGL, else OSMesa.

    Raises:
      WorldEnvError: none works; the message names the system packages to install.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    reasons = []
    for backend in [asked] if asked in _GL_PACKAGES else list(_GL_PACKAGES):
        probe = subprocess.run(
            [sys.executable, "-c", _GL_PROBE],
            env=os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend},
            capture_output=True,
            text=True,
        )
        if probe.returncode == 0:
            return backend
        last = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        reasons.append(f"{backend}: {last} (Debian/Ubuntu: apt-get install {_GL_PACKAGES[backend]})")
    raise WorldEnvError("LIBERO cannot draw, no GL library works: " + "; ".join(reasons))


@functools.cache
def task_names(suite: str) -> tuple[str, ...]:
    """Task names of a suite in the benchmark's order; also the stems of the BDDL and initial-state files."""
    path = package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.libero_task_map[suite])


def instruction(task_name: str) -> str:
    """The benchmark's instruction: the task name without its scene prefix, lower case, with spaces."""
    words = task_name.split("_")
    scenes = [index for index, word in enumerate(words) if word.startswith("SCENE")]
    return " ".join(words[scenes[0] + 1 :] if scenes else words)


def bddl_file(suite: str, task: int) -> Path:
    """The file that defines the task's scene and goal."""
    return package_folder() / "bddl_files" / suite / f"{task_names(suite)[task]}.bddl"


def initial_states(suite: str, task: int) -> np.ndarray:
    """The published initial states, float64 [50, 1 + nq + nv]: time, joint positions, joint velocities."""
    return read_initial_states(package_folder() / "init_files" / suite / f"{task_names(suite)[task]}.pruned_init")


def read_initial_states(path: Path) -> np.ndarray:
    """Reads an array that `torch.save` wrote, without torch and without running anything from the file.

    Raises:
      WorldEnvError: the file is not such an archive, or asks for anything but a NumPy array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                return np.asarray(_ArrayUnpickler(file).load())
    except (OSError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise WorldEnvError(f"cannot read initial states from {path}: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and refuses everything else."""

    def find_class(self, module: str, name: str):
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only NumPy arrays are read")
        return allowed[module, name]


def import_simulator(draw: bool) -> types.ModuleType:
    """Imports hf-libero into this process, quietly and without questions; returns `libero.libero.envs`.

    Args:
      draw: whether frames will be rendered; without, no GL library is needed.
    """
    check_versions()
    package, assets = package_folder(), assets_folder()
    os.environ["LIBERO_CONFIG_PATH"] = str(_write_config(package, assets))
    os.environ["MUJOCO_GL"] = gl_backend() if draw else "disabled"
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads only slow a process per core down
    import robosuite.macros

    robosuite.macros.MUJOCO_GPU_RENDERING = False  # it would overwrite MUJOCO_GL
    import libero.libero

    libero.libero._assets_path_cache = str(assets)  # or it downloads when `assets` is not beside its code
    import libero.libero.envs

    if _version("mujoco") > (3, 3, 2):
        _keep_linear_textures()
    return libero.libero.envs


def _write_config(package: Path, assets: Path) -> Path:
    """Writes hf-libero's config.yaml in our cache folder and returns that folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(f"{package}{assets}".encode()).hexdigest()[:12]
    folder = cache / "worldenv_jax" / f"libero-{digest}"
    paths = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package.parent / "datasets",
        "assets": assets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".config.{os.getpid()}"
    temporary.write_text("".join(f"{key}: '{path}'\n" for key, path in paths.items()))
    temporary.replace(folder / "config.yaml")
    return folder


def _keep_linear_textures() -> None:
    """MuJoCo after 3.3.2 decodes PNG textures as sRGB, which darkens the scene; asks for the old reading."""
    from robosuite.utils.binding_utils import MjSim

    read = MjSim.from_xml_string
    MjSim.from_xml_string = staticmethod(lambda xml: read(xml.replace("<texture ", '<texture colorspace="linear" ')))
