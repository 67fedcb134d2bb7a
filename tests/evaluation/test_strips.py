# SPDX-License-Identifier: Apache-2.0
"""What a strip shows: colours of the borders, columns, the curve's place, files that open again."""

import numpy as np
import pytest
from PIL import Image

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation import strips

NUMBER = 12


def example(**changes):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, NUMBER, 16, 16, 3), np.uint8)
    probability = np.concatenate([[np.nan], np.linspace(0, 1, NUMBER - 1)])
    parts = {
        "imagined": frames[0],
        "true": frames[1],
        "context": 2,
        "probability": probability,
        "end": 7,
        "success": np.arange(NUMBER) >= 9,
    }
    return strips.Strip(**{**parts, **changes})


def count_colour(image, colour):
    return int((image == np.array(colour)).all(-1).sum())


def test_borders():
    strip = example()
    assert strip.border("imagined", 0) == strip.border("true", 1) == strips.GREEN
    assert strip.border("imagined", 2) == strips.RED
    assert strip.border("true", 2) == strips.FAINT
    assert strip.border("imagined", 7) == strip.border("true", 7) == strips.END


def test_error_is_centred_on_grey():
    white, black = np.full((2, 11, 11, 3), 255, np.uint8), np.zeros((2, 11, 11, 3), np.uint8)
    assert (strips.Strip(white, white).rows()[2][1] == 128).all()
    assert (strips.Strip(white, black).rows()[2][1] == 255).all()
    assert (strips.Strip(black, white).rows()[2][1] == 0).all()


def test_columns_start_at_the_context_and_contain_the_end():
    for columns in (2, 3, 5, 30):
        chosen = strips.choose_columns(example(), columns)
        assert chosen[0] == 1
        assert 7 in chosen
        assert chosen == sorted(set(chosen))
        assert len(chosen) <= columns
    assert strips.choose_columns(example(end=None), 3) == [1, 6, 11]
    assert strips.choose_columns(example(end=0, context=4), 3)[0] == 0


def test_frames_are_enlarged_without_blur():
    frame = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    large = strips.enlarge(frame, 9)
    assert large.shape == (8, 10, 3)
    assert (large[::2, ::2] == frame).all() and (large[1::2, 1::2] == frame).all()
    assert strips.enlarge(frame, 3).shape == frame.shape


def test_views_lie_side_by_side():
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 5, 3), np.uint8)
    merged = strips.merge_views(frames)
    assert merged.shape == (3, 4, 10, 3)
    assert (merged[:, :, :5] == frames[:, 0]).all() and (merged[:, :, 5:] == frames[:, 1]).all()


def test_picture_shows_frames_curve_and_end():
    strip = example()
    picture = strips.draw_strip(strip, columns=5, cell=32)
    frame = strips.enlarge(strip.imagined[7], 32)
    windows = np.lib.stride_tricks.sliding_window_view(picture, frame.shape)[:, :, 0]
    assert (windows == frame).all((-3, -2, -1)).any()
    assert count_colour(picture, strips.RED) and count_colour(picture, strips.GREEN)
    assert count_colour(picture, strips.CURVE)
    assert strips.draw_strip(example(probability=None), columns=5, cell=32).shape[0] < picture.shape[0]


def test_end_line_stands_under_its_column():
    picture = strips.draw_strip(example(success=None), columns=5, cell=32)
    framed = np.flatnonzero((picture[60] == np.array(strips.END)).all(-1))
    blueness = picture[-60:-50, :, 2].astype(int) - picture[-60:-50, :, 0]
    line = np.average(np.arange(picture.shape[1]), weights=np.where(blueness > 30, blueness, 0).mean(0))
    assert abs(line - (framed.min() + framed.max()) / 2) <= 1.0


def test_video_reveals_the_curve():
    video = strips.draw_video(example(), cell=32)
    assert len(video) == NUMBER and video.shape[1] % 2 == 0 and video.shape[2] % 2 == 0
    assert count_colour(video[3], strips.CURVE) < count_colour(video[-1], strips.CURVE)
    assert count_colour(video[5], strips.END) == 0 < count_colour(video[7], strips.END)


def test_without_truth_there_is_one_row():
    strip = example(true=None)
    assert [label for label, _ in strip.rows()] == ["imagined"]
    assert strips.draw_strip(strip, cell=32).shape[0] < strips.draw_strip(example(), cell=32).shape[0]


def test_parts_that_do_not_fit_are_listed():
    with pytest.raises(ValueError, match=r"true: got \[3, 16, 16, 3\].*end: got 12, expected 0 to 11"):
        example(true=example().true[:3], end=12)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_videos_open_again(tmp_path, suffix):
    video = strips.draw_video(example(), cell=32)
    path = strips.save_video(tmp_path / f"video{suffix}", video, fps=10, hold=1.0)
    with Image.open(path) as image:
        assert image.n_frames == NUMBER
        assert image.size == (video.shape[2], video.shape[1])
        assert image.info["loop"] == 0
        error = np.abs(np.asarray(image.convert("RGB")).astype(int) - video[0])
    assert error.mean() < 16


def test_mp4(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    path = strips.save_video(tmp_path / "video.mp4", strips.draw_video(example(), cell=32))
    assert path.read_bytes()[4:8] == b"ftyp"


def test_unknown_suffix_leaves_nothing(tmp_path):
    with pytest.raises(WorldEnvError, match="must be .gif, .webp or .mp4"):
        strips.save_video(tmp_path / "video.avi", strips.draw_video(example(), cell=32))
    assert not list(tmp_path.iterdir())
