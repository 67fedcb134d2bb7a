# SPDX-License-Identifier: Apache-2.0
"""LIBERO's surroundings: initial states, instructions, clear errors. Needs no simulator except where marked."""

import importlib.util
import pickle
import zipfile

import numpy as np
import pytest

from worldenv_jax.envs.libero import installation
from worldenv_jax.errors import WorldEnvError


def write_archive(path, content: bytes) -> None:
    """A file as `torch.save` writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def test_initial_states_are_read_without_torch(tmp_path):
    states = np.random.default_rng(0).normal(size=(50, 7))
    write_archive(tmp_path / "a.pruned_init", pickle.dumps(states, protocol=2))
    np.testing.assert_array_equal(installation.read_initial_states(tmp_path / "a.pruned_init"), states)


class Malicious:
    """Runs a command when unpickled by an ordinary unpickler."""

    def __reduce__(self):
        return print, ("owned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    write_archive(tmp_path / "a.pruned_init", pickle.dumps(Malicious()))
    with pytest.raises(WorldEnvError, match=r"a\.pruned_init.*builtins\.print"):
        installation.read_initial_states(tmp_path / "a.pruned_init")
    assert not capsys.readouterr().out


def test_broken_initial_states_name_the_file(tmp_path):
    (tmp_path / "b.pruned_init").write_bytes(b"not a zip archive")
    with pytest.raises(WorldEnvError, match=r"b\.pruned_init"):
        installation.read_initial_states(tmp_path / "b.pruned_init")
    write_archive(tmp_path / "c.pruned_init", pickle.dumps(np.zeros(3), protocol=2)[:20])
    with pytest.raises(WorldEnvError, match=r"c\.pruned_init"):
        installation.read_initial_states(tmp_path / "c.pruned_init")


def test_instruction_drops_the_scene_prefix():
    assert installation.instruction("pick_up_the_milk_and_place_it_in_the_basket") == (
        "pick up the milk and place it in the basket"
    )
    assert installation.instruction("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet") == (
        "close the top drawer of the cabinet"
    )


def test_missing_assets_name_folder_variable_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv(installation.ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(WorldEnvError) as error:
        installation.assets_folder()
    for part in (str(tmp_path), installation.ASSETS_VARIABLE, installation.SETUP_COMMAND):
        assert part in str(error.value)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorldEnvError, match=r"hf-libero, robosuite, bddl, mujoco.*setup_libero"):
        installation.package_folder()


def test_old_mujoco_with_numpy_2_is_refused_and_new_contacts_are_warned_of(monkeypatch):
    versions = {"mujoco": "3.1.0", "numpy": "2.4.6"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(WorldEnvError, match="mujoco==3.3.2"):
        installation.check_versions()
    versions["mujoco"] = "3.8.1"
    with pytest.warns(UserWarning, match="contacts"):
        installation.check_versions()


def test_no_gl_library_names_the_system_packages(monkeypatch):
    installation.gl_backend.cache_clear()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(installation, "_GL_PROBE", "raise SystemExit('no libOSMesa')")
    with pytest.raises(WorldEnvError, match=r"osmesa: no libOSMesa.*apt-get install libosmesa6"):
        installation.gl_backend()
    installation.gl_backend.cache_clear()
