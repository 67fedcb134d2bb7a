# SPDX-License-Identifier: Apache-2.0
"""Atomic files and one-line errors."""

import errno
import os
import subprocess
import sys

import pytest

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError, run_main


def test_files_are_written_whole_and_folders_are_made(tmp_path):
    files.write_text(tmp_path / "a" / "b.txt", "é")
    files.write_json(tmp_path / "a" / "c.json", {"x": [1, None]})
    assert (tmp_path / "a" / "b.txt").read_bytes() == "é".encode()
    assert files.read_json(tmp_path / "a" / "c.json") == {"x": [1, None]}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.txt", "c.json"]


def test_numbers_without_a_json_form_become_null(tmp_path):
    files.write_json(tmp_path / "x.json", {"auroc": float("nan"), "rows": [(1.5, float("inf"))]})
    assert files.read_json(tmp_path / "x.json") == {"auroc": None, "rows": [[1.5, None]]}
    assert "NaN" not in (tmp_path / "x.json").read_text()


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.atomic_path(path) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_one_clear_error(tmp_path):
    path = tmp_path / "data.bin"
    with (
        pytest.raises(WorldEnvError, match="no space left on the device; free some"),
        files.atomic_path(path) as temporary,
    ):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_of_the_system_is_the_same_error(tmp_path):
    program = (
        "import resource, signal, sys\n"
        "from worldenv_jax import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from worldenv_jax.errors import run_main\n"
        "run_main(lambda: files.write_bytes(sys.argv[1], bytes(10_000)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path / "big"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unreadable_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(WorldEnvError, match="cannot read .*x.json"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("main", "code", "shown"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: (_ for _ in ()).throw(WorldEnvError("no such\n  file")), 2, "error: no such file\n"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_run_main_exit_codes(main, code, shown, capsys):
    with pytest.raises(SystemExit) as raised:
        run_main(main)
    assert raised.value.code == code
    assert capsys.readouterr().err == shown
