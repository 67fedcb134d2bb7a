# SPDX-License-Identifier: Apache-2.0
"""EVAC's trajectory images to the pixel, and its two-arm pose rows; NumPy, on the host.

The images have the hard edges of OpenCV's `circle` and `line` (OpenCV is Apache-2.0): midpoint circles, and thick
lines as convex polygons with round caps, in fixed-point coordinates with 16 fractional bits. They are needed where a
released checkpoint must see exactly what it was trained on; the poses are known beforehand there.
"""

import numpy as np

from worldenv_jax.simulator.action_maps import (
    AXIS_COLOURS,
    GRIPPER_COLOURS,
    ActionMapConfig,
    colour_table,
    project,
    tool_points,
)
from worldenv_jax.simulator.delta_actions import delta_actions
from worldenv_jax.simulator.poses import matrix_from_quaternion, multiply_quaternions

GRIPPER_SCALE = 120.0  # recorded gripper values per unit
# The drawn frame is turned about its z axis, radians (left arm, right arm): AgiBot's camera convention.
DRAWN_ROTATION = (-0.5236, 0.5236)
SHIFT = 16
ONE = 1 << SHIFT


def two_arm_deltas(rows: np.ndarray) -> np.ndarray:
    """Pose rows float64 [T, 16] (position, quaternion xyzw, gripper; left, then right) to deltas [T - 1, 14]."""
    arms = rows.reshape(len(rows), 2, 8)
    deltas = [delta_actions(arm[:, :3], arm[:, 3:7], arm[:, 7] / GRIPPER_SCALE) for arm in arms.swapaxes(0, 1)]
    return np.concatenate(deltas, axis=-1)


def drawn_poses(rows: np.ndarray, history: int) -> np.ndarray:
    """Pose rows [T, 16] as they are drawn, the first repeated for the history: float64 [T + history - 1, 16]."""
    rows = np.concatenate([np.repeat(rows[:1], history - 1, axis=0), rows])
    arms = rows.reshape(len(rows), 2, 8).copy()
    for arm, angle in enumerate(DRAWN_ROTATION):
        turn = np.array([0.0, 0.0, np.sin(angle / 2), np.cos(angle / 2)])
        arms[:, arm, 3:7] = multiply_quaternions(arms[:, arm, 3:7], np.broadcast_to(turn, (len(rows), 4)))
    return arms.reshape(len(rows), 16)


def draw_pictures(
    poses: np.ndarray,
    intrinsics: np.ndarray,
    camera_to_world: np.ndarray,
    config: ActionMapConfig,
    height: int,
    width: int,
) -> np.ndarray:
    """Trajectory images of one camera.

    Args:
        poses: float64 [T, 16], from `drawn_poses`.
        intrinsics: float64 [3, 3], of images of height x width pixels.
        camera_to_world: float64 [T, 4, 4].
    Returns: uint8 [T, height, width, 3], RGB.
    """
    arms = poses.reshape(len(poses), 2, 8)
    rotation = matrix_from_quaternion(arms[..., 3:7])
    points = tool_points(rotation, arms[..., :3], config)
    pixels, _ = project(points, intrinsics[None, None], camera_to_world[:, None])
    pixels = np.trunc(pixels).astype(np.int64)
    colour = [colour_table(name) for name in GRIPPER_COLOURS]
    level = np.clip((arms[..., 7] / GRIPPER_SCALE * 256).astype(int), 0, 255)
    images = np.full((len(poses), height, width, 3), config.background, np.uint8)
    for t, image in enumerate(images):
        shown = [a for a in range(2) if 0 <= pixels[t, a, 0, 0] < width and 0 <= pixels[t, a, 0, 1] < height]
        for a in shown:
            fill_circle(image, *pixels[t, a, 0], int(config.radius), colour[a][level[t, a]])
        for a in shown:
            for axis in range(3):
                thick_line(image, pixels[t, a, 0], pixels[t, a, axis + 1], int(config.thickness), AXIS_COLOURS[a][axis])
    return images


def fill_circle(image: np.ndarray, x: int, y: int, radius: int, colour) -> None:
    """Fills the midpoint circle around (x, y)."""
    widths = _circle_widths(radius)
    for offset in range(-radius, radius + 1):
        _fill_row(image, y + offset, x - widths[abs(offset)], x + widths[abs(offset)], colour)


def thick_line(image: np.ndarray, start, end, thickness: int, colour) -> None:
    """Draws a line from (x, y) to (x, y) as a polygon with round caps."""
    start, end = ([int(v) << SHIFT for v in point] for point in (start, end))
    dx, dy = (start[0] - end[0]) / ONE, (end[1] - start[1]) / ONE
    squared = dx * dx + dy * dy
    half = thickness << (SHIFT - 1)
    if squared > np.finfo(np.float64).eps:
        scale = (half + (thickness & 1) * ONE * 0.5) / np.sqrt(squared)
        across, along = int(np.rint(dy * scale)), int(np.rint(dx * scale))
        corners = [
            (start[0] + across, start[1] + along),
            (start[0] - across, start[1] - along),
            (end[0] - across, end[1] - along),
            (end[0] + across, end[1] + along),
        ]
        _fill_convex(image, corners, colour)
    for x, y in (start, end):
        half_pixel = ONE >> 1
        fill_circle(image, (x + half_pixel) >> SHIFT, (y + half_pixel) >> SHIFT, (half + half_pixel) >> SHIFT, colour)


def _circle_widths(radius: int) -> list[int]:
    """Half the width of a filled circle in each row from its centre outwards."""
    widths = [0] * (radius + 1)
    error, x, y, plus, minus = 0, radius, 0, 1, 2 * radius - 1
    while x >= y:
        widths[y] = max(widths[y], x)
        widths[x] = max(widths[x], y)
        y += 1
        error += plus
        plus += 2
        if error > 0:
            error -= minus
            x -= 1
            minus -= 2
    return widths


def _fill_row(image: np.ndarray, y: int, first: int, last: int, colour) -> None:
    height, width = image.shape[:2]
    if 0 <= y < height and last >= 0 and first < width:
        image[y, max(first, 0) : last + 1] = colour


def _fill_convex(image: np.ndarray, corners: list[tuple[int, int]], colour) -> None:
    """Outline and interior of a convex polygon in fixed-point coordinates."""
    for start, end in zip([corners[-1], *corners[:-1]], corners):
        _thin_line(image, start, end, colour)
    height, width = image.shape[:2]
    round_down = lambda value: (value + (ONE >> 1)) >> SHIFT
    xs, ys = zip(*corners)
    if round_down(max(xs)) < 0 or round_down(max(ys)) < 0 or round_down(min(xs)) >= width:
        return
    lowest = ys.index(min(ys))
    # Two chains of edges run from the topmost corner, one each way round; the last row belongs to neither.
    chains = [_edge_positions([corners[(lowest + step * i) % 4] for i in range(5)]) for step in (1, -1)]
    for y in range(max(round_down(min(ys)), 0), min(round_down(max(ys)), height - 1) + 1):
        left, right = sorted(chain(y) for chain in chains)
        _fill_row(image, y, round_down(left), round_down(right), colour)


def _edge_positions(corners: list[tuple[int, int]]):
    """A function from a row to the fixed-point x of a chain of edges, downwards from the first corner.

    Each edge starts at its corner's exact x, in the row that the corner rounds to, and moves by a whole number of
    fixed-point units per row; after the last row the chain stays on its last edge.
    """
    rows = [(y + (ONE >> 1)) >> SHIFT for _, y in corners]
    edges = []
    for i in range(len(corners) - 1):
        count = rows[i + 1] - rows[i]
        if count < 0:
            break
        if count > 0:
            slope = _divide((corners[i + 1][0] - corners[i][0]) * 2 + count, 2 * count)
            edges.append((rows[i], corners[i][0], slope))

    def position(y: int) -> int:
        row, x, slope = [edge for edge in edges if edge[0] <= y][-1] if edges else (y, -ONE, 0)
        return x + slope * (y - row)

    return position


def _thin_line(image: np.ndarray, start: tuple[int, int], end: tuple[int, int], colour) -> None:
    """One pixel per step along the longer axis, between fixed-point coordinates."""
    height, width = image.shape[:2]
    clipped = _clip_line(width << SHIFT, height << SHIFT, start, end)
    if clipped is None:
        return
    (x1, y1), (x2, y2) = clipped
    dx, dy = x2 - x1, y2 - y1
    half = ONE >> 1
    steep = abs(dx) <= abs(dy)
    if (dy if steep else dx) < 0:
        x1, y1, x2, y2, dx, dy = x2, y2, x1, y1, -dx, -dy
    points = [((x2 + half) >> SHIFT, (y2 + half) >> SHIFT)]
    if steep:
        slope = _divide(dx * ONE, dy | 1)
        row, x = (y1 + half) >> SHIFT, x1 + half
        points += [((x + slope * i) >> SHIFT, row + i) for i in range(((y2 - y1) >> SHIFT) + 1)]
    else:
        slope = _divide(dy * ONE, dx | 1)
        column, y = (x1 + half) >> SHIFT, y1 + half
        points += [(column + i, (y + slope * i) >> SHIFT) for i in range(((x2 - x1) >> SHIFT) + 1)]
    for x, y in points:
        if 0 <= x < width and 0 <= y < height:
            image[y, x] = colour


def _clip_line(width: int, height: int, start: tuple[int, int], end: tuple[int, int]):
    """Cohen-Sutherland clipping to [0, width) x [0, height); None where nothing is left."""
    (x1, y1), (x2, y2) = start, end
    right, bottom = width - 1, height - 1
    code = lambda x, y: (x < 0) + (x > right) * 2 + (y < 0) * 4 + (y > bottom) * 8
    first, second = code(x1, y1), code(x2, y2)
    if first & second == 0 and first | second != 0:
        if first & 12:
            edge = 0 if first < 8 else bottom
            x1 += int((edge - y1) * (x2 - x1) / (y2 - y1))
            y1 = edge
            first = (x1 < 0) + (x1 > right) * 2
        if second & 12:
            edge = 0 if second < 8 else bottom
            x2 += int((edge - y2) * (x2 - x1) / (y2 - y1))
            y2 = edge
            second = (x2 < 0) + (x2 > right) * 2
        if first & second == 0 and first | second != 0:
            if first:
                edge = 0 if first == 1 else right
                y1 += int((edge - x1) * (y2 - y1) / (x2 - x1))
                x1, first = edge, 0
            if second:
                edge = 0 if second == 1 else right
                y2 += int((edge - x2) * (y2 - y1) / (x2 - x1))
                x2, second = edge, 0
    return ((x1, y1), (x2, y2)) if first | second == 0 else None


def _divide(a: int, b: int) -> int:
    """Integer division that rounds towards zero, b > 0."""
    return a // b if a >= 0 else -(-a // b)
