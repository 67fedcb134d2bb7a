#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the LIBERO simulator lean (1.4 GB, no torch) for the current Python, and its assets. May be run again: what
# is there is left alone.
#
#   tools/setup_libero.sh [python]
#
# python                 the interpreter to install for (default: .venv/bin/python of this checkout, else python)
# LIBERO_ASSETS_ARCHIVE  a tar.xz of the assets (default: ../shared/libero/assets.tar.xz beside this checkout when it
#                        is there); without an archive, hf-libero downloads the originals from the Hugging Face hub
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${1:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python)"
say() { echo "setup_libero: $*"; }

# A GL library: rendering needs EGL or OSMesa.
has_gl() { "$python" -c "import ctypes.util as u, sys; sys.exit(not (u.find_library('EGL') or u.find_library('OSMesa')))"; }
if has_gl; then
  say "GL library: present"
elif [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  apt-get update -qq && apt-get install -y -qq libegl1 libgl1-mesa-dri > /dev/null
  say "GL library: installed libegl1 libgl1-mesa-dri"
else
  say "GL library: MISSING; ask for: apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)"
fi

# Packages. The first three declare gigabytes that the simulator does not import, hence --no-deps.
if "$python" -c "import importlib.metadata as m; [m.version(p) for p in ('hf-libero', 'robosuite', 'bddl', 'numba')]
assert m.version('mujoco') == '3.3.2'" 2> /dev/null; then
  say "packages: present"
else
  "$python" -m pip install -q --no-deps hf-libero==0.1.4 bddl==1.0.1 robosuite==1.4.0
  "$python" -m pip install -q mujoco==3.3.2 numba scipy opencv-python-headless pyyaml termcolor future easydict \
    cloudpickle gymnasium networkx h5py pillow matplotlib
  say "packages: installed hf-libero 0.1.4, robosuite 1.4.0, mujoco 3.3.2"
fi

# Assets, unpacked once into the cache and linked beside the package's code, where it looks for them.
code="$("$python" -c "import importlib.util as u; print(list(u.find_spec('libero').submodule_search_locations)[0])")/libero"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/worldenv_jax/libero_assets"
archive="${LIBERO_ASSETS_ARCHIVE:-$root/../shared/libero/assets.tar.xz}"
if [ -d "$code/assets/scenes" ]; then
  say "assets: present ($(readlink -f "$code/assets"))"
elif [ -d "$cache/scenes" ]; then
  ln -sfn "$cache" "$code/assets"
  say "assets: linked $cache"
elif [ -f "$archive" ]; then
  rm -rf "$cache.partial" && mkdir -p "$cache.partial"
  tar xJf "$archive" -C "$cache.partial"
  rm -rf "$cache" && mv "$cache.partial" "$cache"
  ln -sfn "$cache" "$code/assets"
  say "assets: unpacked $archive to $cache"
else
  say "assets: no archive at $archive; downloading the originals through hf-libero"
  "$python" -m pip install -q huggingface_hub
  config="$(mktemp -d)"
  for key in benchmark_root bddl_files init_states datasets assets; do echo "$key: '$code'"; done > "$config/config.yaml"
  folder="$(LIBERO_CONFIG_PATH="$config" "$python" -c \
    "from libero.libero.utils.download_utils import download_assets_from_huggingface as get; print(get())" | tail -n 1)"
  ln -sfn "$folder" "$code/assets"
  say "assets: downloaded to $folder"
fi
