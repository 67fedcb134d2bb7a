# SPDX-License-Identifier: Apache-2.0
"""The manifest of a workdir."""

import jax

from worldenv_jax import files
from worldenv_jax.manifest import write_manifest


def test_manifest_records_what_a_result_depends_on_and_every_start(tmp_path):
    write_manifest(tmp_path, {"preset": "debug"}, seed=3, dataset_fingerprint="abc", protocol_hash="def")
    written = write_manifest(tmp_path, {"preset": "debug"}, seed=3)
    read = files.read_json(tmp_path / "manifest.json")
    assert read == written
    assert (read["config"], read["seed"]) == ({"preset": "debug"}, 3)
    assert len(read["starts"]) == 2
    start = read["starts"][0]
    assert start["versions"]["jax"] == jax.__version__
    assert start["device"].startswith(f"{jax.device_count()} x ")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
