# SPDX-License-Identifier: Apache-2.0
"""The PyTorch file reader: equal to torch on real files, and deaf to anything that would execute."""

import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from worldenv_jax.weights.errors import WeightsError
from worldenv_jax.weights.torch_files import load_torch_file, save_torch_file


def test_round_trip_keeps_names_order_dtypes_and_bytes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.standard_normal((3, 4)).astype(np.float32), "b": np.arange(200000, dtype=np.int64)}
    tensors |= {"c": rng.standard_normal(5).astype(jnp.bfloat16), "scalar": np.float16(3.0).reshape(())}
    save_torch_file(tmp_path / "x.pt", tensors)
    loaded = load_torch_file(tmp_path / "x.pt")
    assert list(loaded) == list(tensors)
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


@pytest.mark.parity
def test_reads_what_torch_writes_and_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6)
    state = OrderedDict(w=base.t(), part=base[1:, 2:4], half=torch.randn(3).bfloat16(), count=torch.tensor(7))
    state = {"model": state, "parameter": torch.nn.Parameter(torch.ones(2)), "step": 3, "names": ["x", None]}
    torch.save(state, tmp_path / "torch.pt")
    loaded = load_torch_file(tmp_path / "torch.pt")
    np.testing.assert_array_equal(loaded["model"]["w"], base.numpy().T)
    np.testing.assert_array_equal(loaded["model"]["part"], base.numpy()[1:, 2:4])
    half = state["model"]["half"]
    np.testing.assert_array_equal(loaded["model"]["half"].astype(np.float32), half.float().numpy())
    assert loaded["step"] == 3 and loaded["names"] == ["x", None] and loaded["model"]["count"] == 7
    ours = {"w": base.numpy(), "inside": {"h": half.float().numpy().astype(jnp.bfloat16)}, "empty": {}}
    save_torch_file(tmp_path / "ours.pt", ours)
    back = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert torch.equal(back["w"], base) and torch.equal(back["inside"]["h"], half) and back["empty"] == {}


class _Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_refuses_a_pickle_that_would_call_something(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": _Hostile()}, protocol=2))
    with pytest.raises(ValueError, match="print, which is not allowed"):
        load_torch_file(tmp_path / "bad.pt")
    assert "executed" not in capsys.readouterr().out


def test_refuses_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="old.pt is not a PyTorch file"):
        load_torch_file(tmp_path / "old.pt")


@pytest.mark.parametrize(
    "data",
    [b"\x80\x02}r\xff\xff\xff\x0f.", b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00."],
    ids=["memo number", "length of a bytearray"],
)
def test_refuses_a_pickle_that_announces_gigabytes(tmp_path, data):
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(WeightsError, match="big.pt"):
        load_torch_file(tmp_path / "big.pt")


def test_refuses_compressed_parts(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 100000)
    with pytest.raises(WeightsError, match="compressed"):
        load_torch_file(tmp_path / "bomb.pt")
