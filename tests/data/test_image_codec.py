# SPDX-License-Identifier: Apache-2.0
"""Image codecs against TensorFlow's output, and frames decoded on demand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldenv_jax.data.errors import DataError
from worldenv_jax.data.image_codec import EncodedFrames, decode_image, encode_image

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 2, 6, 8, 3), np.uint8)


@pytest.fixture
def encoded():
    return EncodedFrames([[encode_image(frame, "png") for frame in FRAMES[:, v]] for v in range(2)], "episodes")


@pytest.mark.parametrize("view", ["agentview", "wrist"])
def test_jpeg_equals_tensorflow(fixtures_dir, view):
    with np.load(fixtures_dir / "images" / "libero_frame.npz") as truth:
        decoded = truth[f"{view}_jpeg_decoded"]
        np.testing.assert_array_equal(decode_image(truth[f"{view}_jpeg_q95"].tobytes()), decoded)
        reencoded = encode_image(truth[f"{view}_policy_frame"], "jpeg")
        np.testing.assert_array_equal(decode_image(reencoded), decoded)


def test_frames_behave_like_the_array(encoded):
    assert encoded.shape == FRAMES.shape and encoded.dtype == np.uint8 and len(encoded) == 5
    np.testing.assert_array_equal(np.asarray(encoded), FRAMES)
    repeated = np.array([3, 0, 3])
    for index in (2, -1, slice(1, 4), slice(5, 5), repeated, (2, 1), (slice(None), 0), (repeated, 1, slice(2, 4))):
        np.testing.assert_array_equal(encoded[index], FRAMES[index])


def test_frame_out_of_range(encoded):
    with pytest.raises(IndexError):
        encoded[5]


def test_damaged_frame_is_named(encoded):
    encoded.views[1][2] = encoded.views[1][2][:40]
    np.testing.assert_array_equal(encoded[1], FRAMES[1])
    with pytest.raises(DataError, match="episodes: frames 2 to 2 of an episode"):
        encoded[2]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["png", "jpeg"]), st.integers(0, 10**6), st.binary(max_size=6), st.booleans())
def test_damaged_images(encoding, position, inserted, cut):
    """A wrong picture or ValueError, never anything else; what was not changed is the right picture."""
    data = encode_image(FRAMES[0, 0], encoding)
    position %= len(data)
    rest = b"" if cut else data[position + len(inserted) :]
    damaged = data[:position] + inserted + rest
    try:
        image = decode_image(damaged)
    except ValueError:
        assert damaged != data
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if damaged == data:
        np.testing.assert_array_equal(image, decode_image(data))
