# SPDX-License-Identifier: Apache-2.0
"""Pictures of a prediction: true | imagined | error, the reward curve under the frames, the end marked.

As in DreamerV3's reports, frames that the model was given have a green border, imagined frames a red one, and the error
is drawn around mid-grey: 128 + (imagined - true) / 2. A `Strip` is drawn either as one picture (time runs to the right,
the curve is aligned with the columns) or as an animation (a cursor runs along the curve).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldenv_jax import files
from worldenv_jax.errors import WorldEnvError

BACKGROUND, INK, FAINT = (17, 22, 29), (214, 222, 232), (72, 84, 99)
GREEN, RED, CURVE, END, TRUTH = (64, 192, 87), (240, 82, 82), (255, 196, 61), (82, 182, 255), (64, 192, 87)
BORDER, GAP, MARGIN, LABELS, CURVE_HEIGHT = 3, 4, 10, 76, 96
_FONT = ImageFont.load_default(13)


@dataclass(frozen=True)
class Strip:
    """N consecutive frames of one trajectory and what is known about them."""

    imagined: np.ndarray  # uint8 [N, H, W, 3]; the first `context` of them are the frames the model was given
    true: np.ndarray | None = None  # uint8 [N, H, W, 3]; None where nobody knows the truth
    context: int = 1
    probability: np.ndarray | None = None  # float [N], the reflector's R; NaN where it has not judged
    threshold: float = 0.5  # eta
    end: int | None = None  # index of the frame at which the trajectory ended
    success: np.ndarray | None = None  # bool [N], the true task predicate

    def __post_init__(self):
        shape, number = self.imagined.shape, len(self.imagined)
        expected = {"imagined": shape, "true": shape, "probability": (number,), "success": (number,)}
        problems = [
            f"{name}: got {list(value.shape)}, expected {list(wanted)}"
            for name, wanted in expected.items()
            if (value := getattr(self, name)) is not None and value.shape != wanted
        ]
        if len(shape) != 4 or shape[-1] != 3 or self.imagined.dtype != np.uint8:
            problems.append(f"imagined: got {self.imagined.dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
        if self.end is not None and not 0 <= self.end < number:
            problems.append(f"end: got {self.end}, expected 0 to {number - 1}")
        if problems:
            raise ValueError("a strip's parts do not fit together: " + "; ".join(problems))

    def rows(self) -> list[tuple[str, np.ndarray]]:
        """(label, frames uint8 [N, H, W, 3]) of each row."""
        if self.true is None:
            return [("imagined", self.imagined)]
        difference = self.imagined.astype(np.int16) - self.true
        error = (128 + difference // 2).astype(np.uint8)
        return [("true", self.true), ("imagined", self.imagined), ("error", error)]

    def border(self, label: str, index: int) -> tuple[int, int, int]:
        """Colour around a frame: green where it was given, red where it was imagined, blue where it ends."""
        if index == self.end:
            return END
        if index < self.context:
            return GREEN
        return RED if label == "imagined" else FAINT


def merge_views(frames: np.ndarray) -> np.ndarray:
    """Puts the views of uint8 [..., V, H, W, 3] side by side: uint8 [..., H, V * W, 3]."""
    moved = np.moveaxis(frames, -4, -3)
    return moved.reshape(*moved.shape[:-3], -1, 3)


def enlarge(frame: np.ndarray, height: int) -> np.ndarray:
    """Repeats pixels of uint8 [H, W, 3] by the largest whole factor that keeps at most `height` rows (at least 1)."""
    factor = max(1, height // frame.shape[0])
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_strip(strip: Strip, columns: int = 10, cell: int = 128) -> np.ndarray:
    """Draws one picture: evenly chosen frames as columns, the last context frame and the end always among them.

    Args:
      strip: what to draw.
      columns: how many frames at most.
      cell: height of a frame in pixels; smaller frames are enlarged by pixel repetition.

    Returns:
      uint8 [height, width, 3].
    """
    chosen = choose_columns(strip, columns)
    rows = strip.rows()
    height, width = (side + 2 * BORDER for side in enlarge(strip.imagined[0], cell).shape[:2])
    curve_top = MARGIN + 18 + len(rows) * (height + GAP)
    size = (LABELS + len(chosen) * (width + GAP) + MARGIN, curve_top + _curve_space(strip))
    canvas, pen = _canvas(size)
    centres = [LABELS + column * (width + GAP) + width // 2 for column in range(len(chosen))]
    for row, (label, frames) in enumerate(rows):
        top = MARGIN + 18 + row * (height + GAP)
        _text(pen, (LABELS - 10, top + height // 2), label, INK, "rm")
        for centre, index in zip(centres, chosen):
            frame = _bordered(enlarge(frames[index], cell), strip.border(label, index))
            canvas.paste(Image.fromarray(frame), (centre - width // 2, top))
    for centre, index in zip(centres, chosen):
        name = "end" if index == strip.end else f"t = {index}"
        _text(pen, (centre, MARGIN + 8), name, END if index == strip.end else INK, "mm")
    if strip.probability is not None:
        positions = np.interp(np.arange(len(strip.imagined)), chosen, centres)
        top, height = curve_top + 6, CURVE_HEIGHT - 26
        _draw_curve(canvas, strip, positions, top, height)
        _text(pen, (LABELS - 10, top + height // 2), "reward", CURVE, "rm")
        if strip.success is not None:
            _text(pen, (LABELS - 10, top + height + 8), "success", TRUTH, "rm")
    return np.asarray(canvas)


def draw_video(strip: Strip, cell: int = 160) -> np.ndarray:
    """Draws an animation: true | imagined | error side by side, under them the curve up to now.

    Args:
      strip: what to draw.
      cell: height of a frame in pixels; smaller frames are enlarged by pixel repetition.

    Returns:
      uint8 [N, height, width, 3], both sides even (as video codecs ask for).
    """
    rows = strip.rows()
    height, width = (side + 2 * BORDER for side in enlarge(strip.imagined[0], cell).shape[:2])
    curve_top = MARGIN + 18 + height + GAP
    size = (2 * MARGIN + len(rows) * (width + GAP) - GAP, curve_top + _curve_space(strip))
    size = tuple(side + side % 2 for side in size)
    positions = np.linspace(MARGIN + 34, size[0] - MARGIN - 6, len(strip.imagined))
    images = []
    for index in range(len(strip.imagined)):
        canvas, pen = _canvas(size)
        for column, (label, frames) in enumerate(rows):
            left = MARGIN + column * (width + GAP)
            _text(pen, (left + width // 2, MARGIN + 8), label, INK, "mm")
            frame = _bordered(enlarge(frames[index], cell), strip.border(label, index))
            canvas.paste(Image.fromarray(frame), (left, MARGIN + 18))
        if strip.probability is not None:
            _draw_curve(canvas, strip, positions, curve_top + 6, CURVE_HEIGHT - 26, until=index)
        images.append(np.asarray(canvas))
    return np.stack(images)


def choose_columns(strip: Strip, columns: int) -> list[int]:
    """At most `columns` frame numbers, evenly spread from the last context frame on, the end among them."""
    number = len(strip.imagined)
    first = min(max(strip.context - 1, 0), number - 1)
    chosen = np.linspace(first, number - 1, min(columns, number - first)).round().astype(int)
    if strip.end is not None and strip.end not in chosen:
        inner = 1 + np.abs(chosen[1:-1] - strip.end).argmin() if len(chosen) > 2 else len(chosen) - 1
        chosen[inner] = strip.end
    return sorted(int(index) for index in chosen)


def save_image(path: str | Path, image: np.ndarray) -> Path:
    """Writes uint8 [H, W, 3] in the format of the suffix (.png, .webp), atomically."""
    with files.atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, optimize=True)
    return Path(path)


def save_video(path: str | Path, frames: np.ndarray, fps: float = 10.0, hold: float = 1.0) -> Path:
    """Writes an animation, atomically.

    Args:
      path: .gif and .webp are written by Pillow and loop for ever; .mp4 needs the extra `video`.
      frames: uint8 [N, H, W, 3].
      fps: frames per second.
      hold: seconds for which the last frame stays.

    Raises:
      WorldEnvError: another suffix, or .mp4 without imageio-ffmpeg.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".webp", ".mp4"):
        raise WorldEnvError(f"cannot write {path}: a video's suffix must be .gif, .webp or .mp4")
    with files.atomic_path(path) as temporary:
        if path.suffix == ".mp4":
            held = np.repeat(frames[-1:], round(hold * fps), axis=0)
            _save_mp4(temporary, np.concatenate([frames, held]), fps)
        else:
            images = [Image.fromarray(frame) for frame in frames]
            if path.suffix == ".gif":
                images = _share_palette(images)
            durations = [round(1000 / fps)] * (len(images) - 1) + [round(1000 * (hold + 1 / fps))]
            options = {"quality": 80, "method": 4} if path.suffix == ".webp" else {"optimize": False, "disposal": 1}
            images[0].save(temporary, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    return path


def _save_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        message = f"cannot write {path.suffix} without ffmpeg: pip install 'worldenv-jax[video]', or use .gif or .webp"
        raise WorldEnvError(message) from error
    size = (frames.shape[2], frames.shape[1])
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2, output_params=["-crf", "20"])
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _share_palette(images: Sequence[Image.Image]) -> list[Image.Image]:
    """One palette for all frames (from at most eight of them), so that still parts do not flicker."""
    samples = [images[i] for i in np.linspace(0, len(images) - 1, min(8, len(images))).round().astype(int)]
    palette = Image.fromarray(np.concatenate([np.asarray(image) for image in samples])).quantize(256)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


def _canvas(size: tuple[int, ...]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", size, BACKGROUND)
    return canvas, ImageDraw.Draw(canvas)


def _text(pen: ImageDraw.ImageDraw, position: tuple[float, float], text: str, colour, anchor: str) -> None:
    pen.text(position, text, fill=colour, font=_FONT, anchor=anchor)


def _curve_space(strip: Strip) -> int:
    return MARGIN if strip.probability is None else CURVE_HEIGHT


def _bordered(frame: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    bordered = np.empty((frame.shape[0] + 2 * BORDER, frame.shape[1] + 2 * BORDER, 3), np.uint8)
    bordered[:] = colour
    bordered[BORDER:-BORDER, BORDER:-BORDER] = frame
    return bordered


def _draw_curve(
    canvas: Image.Image, strip: Strip, positions: np.ndarray, top: int, height: int, until: int | None = None
) -> None:
    """R over the frames' x positions; eta dashed, true success as a bar below, a line where the trajectory ended."""
    scale = 3  # drawn large and shrunk: smooth lines
    until = len(positions) - 1 if until is None else until
    left, right = positions[0] - 6, positions[-1] + 6
    area = Image.new("RGB", (canvas.width * scale, (height + 20) * scale), BACKGROUND)
    pen = ImageDraw.Draw(area)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * scale, y * scale

    def level(value: float) -> float:
        return 6 + (height - 6) * (1.0 - float(value))

    for value in (0.0, 1.0):
        pen.line([at(left, level(value)), at(right, level(value))], fill=FAINT, width=2)
    for x in np.arange(left, right, 8):
        pen.line([at(x, level(strip.threshold)), at(min(x + 4, right), level(strip.threshold))], fill=INK, width=2)
    if strip.success is not None:
        edges = _edges(positions)
        for index in np.flatnonzero(strip.success[: until + 1]):
            pen.rectangle([at(edges[index], height + 6), at(edges[index + 1], height + 11)], fill=TRUTH)
    if strip.end is not None and strip.end <= until:
        pen.line([at(positions[strip.end], level(1.0)), at(positions[strip.end], level(0.0))], fill=END, width=5)
    judged = [i for i in range(until + 1) if np.isfinite(strip.probability[i])]
    points = [at(positions[i], level(strip.probability[i])) for i in judged]
    if len(points) > 1:
        pen.line(points, fill=CURVE, width=6, joint="curve")
    for x, y in points[-1:]:
        pen.ellipse([x - 10, y - 10, x + 10, y + 10], fill=CURVE)
    canvas.paste(area.resize((canvas.width, height + 20), Image.Resampling.LANCZOS), (0, top))
    for value in {0.0, strip.threshold, 1.0}:
        _text(ImageDraw.Draw(canvas), (left - 6, top + level(value)), f"{value:g}", INK, "rm")


def _edges(positions: np.ndarray) -> np.ndarray:
    """Borders half-way between neighbouring positions: [N] -> [N + 1]."""
    middles = (positions[1:] + positions[:-1]) / 2.0
    return np.concatenate([positions[:1] - 3, middles, positions[-1:] + 3])
