# SPDX-License-Identifier: Apache-2.0
"""Where to grasp an object, planned from points on its collision shapes: no table of objects.

Kinds: *straddle* (fingers on both sides of something narrow enough), *rim* (one finger inside the wall of a
hollow thing) and *tilted* (a rim grasp with the hand leaning away from what stands close by). Every candidate has a
cost in which one unit is about a radian of wrist rotation; the cheapest is tried first. Lengths in metres.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from worldenv_jax.envs.libero.scene import rotation_vector

_WIDEST = 0.0745  # what fits between the open fingers
_ANGLES = np.arange(24) * np.pi / 24
_TOP_DEPTHS = (0.012, 0.02, 0.035)  # of the fingertips below the top of the object
_LEAN = np.deg2rad(40)
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Grasp:
    """A pose of the grip site."""

    cost: float
    position: np.ndarray  # [3]
    rotation: np.ndarray  # [3, 3]
    kind: str  # "straddle", "rim", "tilted" or "handle"


def pointing_down(angle: float) -> np.ndarray:
    """Rotation of a hand that points down with its closing direction at `angle` in the horizontal plane."""
    x = np.array([np.cos(angle), np.sin(angle), 0.0])
    return np.stack([x, np.cross(-UP, x), -UP], axis=1)


def nearest_turn(angle: float, now: float) -> float:
    """The angle nearest to `now` at which the two-fingered hand closes in the same direction."""
    return angle + np.round((now - angle) / np.pi) * np.pi


def hand_frame(approach: np.ndarray, closing: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Rotation with the given approach and closing directions, of the two the one nearer to rotation `now`."""
    frames = [np.stack([s * closing, np.cross(approach, s * closing), approach], axis=1) for s in (1, -1)]
    return min(frames, key=lambda frame: np.linalg.norm(rotation_vector(frame @ now.T)))


def plan_grasps(points: np.ndarray, others: np.ndarray, origin: np.ndarray, rotation: np.ndarray) -> list[Grasp]:
    """Grasps from above, cheapest first.

    Args:
      points: [n, 3] on the object.
      others: [m, 3] on everything that the hand must not touch.
      origin: [3], the object's body origin (near its centre of mass).
      rotation: [3, 3], of the hand now.
    """
    now = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    grasps = [*_straddle_grasps(points, others, origin, now), *_rim_grasps(points, others, now)]
    return sorted(grasps, key=lambda grasp: grasp.cost)


def hand_collisions(position: np.ndarray, angle: float, others: np.ndarray, opening: float = 0.04) -> int:
    """How many points lie inside the open hand (fingers and palm as boxes) at a pose that points down."""
    closing = np.array([np.cos(angle), np.sin(angle)])
    offset = others - position
    along = np.abs(offset[:, :2] @ closing)
    across = np.abs(offset[:, :2] @ np.array([-closing[1], closing[0]]))
    height = offset[:, 2]
    fingers = (np.abs(along - opening - 0.01) < 0.014) & (across < 0.014) & (height > -0.01) & (height < 0.05)
    palm = (along < 0.105) & (across < 0.035) & (height > 0.045) & (height < 0.2)
    return int(fingers.sum() + palm.sum())


def _straddle_grasps(points: np.ndarray, others: np.ndarray, origin: np.ndarray, now: float) -> Iterator[Grasp]:
    bottom, top = points[:, 2].min(), points[:, 2].max()
    for height in sorted({round(max(top - depth, bottom + 0.012), 4) for depth in _TOP_DEPTHS}):
        slab = points[np.abs(points[:, 2] - height) < max(0.008, 0.12 * (top - bottom))]
        slab = slab if len(slab) >= 4 else points
        above = points[points[:, 2] > height - 0.01]
        for angle in _ANGLES:
            closing = np.array([np.cos(angle), np.sin(angle)])
            across = np.array([-closing[1], closing[0]])
            places = slab[:, :2] @ across
            middle, half = (places.min() + places.max()) / 2, (places.max() - places.min()) / 2
            for place in middle + np.arange(-4, 5) * 0.02:
                if abs(place - middle) > max(half - 0.012, 0.0):
                    continue
                between = slab[np.abs(places - place) < 0.014][:, :2] @ closing
                passed = above[np.abs(above[:, :2] @ across - place) < 0.016][:, :2] @ closing
                if len(between) < 4 or not len(passed) or max(np.ptp(between), np.ptp(passed)) > _WIDEST:
                    continue
                width = np.ptp(between)
                position = np.array([*(closing * (between.min() + width / 2) + across * place), height])
                turn = nearest_turn(angle, now)
                cost = 0.5 * hand_collisions(position, turn, others) + 1.2 * abs(turn - now) + 10 * width
                cost += 25 * np.linalg.norm(position[:2] - origin[:2]) + 800 * max(0.0, width - 0.068)
                cost += 8 * (top - height < 0.015)
                if top - bottom > 0.09:  # tall things: not too near the top, or they tip over
                    cost += 20 * abs(top - height - 0.03)
                yield Grasp(cost, position, pointing_down(turn), "straddle")


def _rim_grasps(points: np.ndarray, others: np.ndarray, now: float) -> Iterator[Grasp]:
    bottom, top = points[:, 2].min(), points[:, 2].max()
    ring = points[points[:, 2] > top - 0.012][:, :2]
    if len(ring) <= 16:
        return
    centre = (ring.min(axis=0) + ring.max(axis=0)) / 2
    inner = points[np.linalg.norm(points[:, :2] - centre, axis=1) < 0.02]
    if len(inner) and inner[:, 2].max() >= top - min(0.015, 0.5 * (top - bottom)):
        return  # not hollow
    flat = top - bottom < 0.03
    height = bottom + 0.0135 if flat else max(top - 0.022, bottom + 0.012)
    below = points[np.abs(points[:, 2] - (top - 0.02)) < 0.006][:, :2]
    for angle in np.arange(36) * np.pi / 18:
        outer = _radius(ring - centre, angle)
        if outer is None or outer < 0.025:
            continue
        lower = _radius(below - centre, angle)
        radius = (outer + (outer if lower is None else lower)) / 2 - 0.003
        position = np.array([*(centre + radius * np.array([np.cos(angle), np.sin(angle)])), height])
        turn = nearest_turn(angle, now)
        cost = 0.5 * hand_collisions(position, turn, others) + 1.2 * abs(turn - now) + (3.5 if flat else 1.5)
        yield Grasp(cost, position, pointing_down(turn), "rim")


def _radius(offsets: np.ndarray, angle: float) -> float | None:
    """Distance from the centre to the outermost of the points [n, 2] in one direction."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    along, across = offsets @ direction, offsets @ np.array([-direction[1], direction[0]])
    chosen = along[(np.abs(across) < 0.012) & (along > 0)]
    return float(chosen.max()) if len(chosen) else None


def plan_tilted_grasp(points: np.ndarray, others: np.ndarray, rotation: np.ndarray) -> Grasp | None:
    """A rim grasp with the hand leaning away from obstacles; None where nothing tall stands near.

    Args: as in `plan_grasps`.
    """
    top = points[:, 2].max()
    centre = (points[:, :2].min(axis=0) + points[:, :2].max(axis=0)) / 2
    near = (np.linalg.norm(others[:, :2] - centre, axis=1) < 0.17) & (others[:, 2] > top + 0.03)
    if not near.any():
        return None
    ring = points[points[:, 2] > top - 0.012][:, :2] - centre
    candidates = []
    for angle in np.arange(24) * np.pi / 12:
        lean = np.array([np.cos(angle), np.sin(angle), 0.0])
        approach = -np.cos(_LEAN) * UP - np.sin(_LEAN) * lean
        closing = np.cos(_LEAN) * lean - np.sin(_LEAN) * UP
        position = np.array([*(centre + ((ring @ lean[:2]).max() - 0.006) * lean[:2]), top - 0.016])
        offset = others - position
        back, along = -(offset @ approach), np.abs(offset @ closing)
        across = np.abs(offset @ np.cross(approach, closing))
        palm = (along < 0.11) & (across < 0.045) & (back > 0.04) & (back < 0.22)
        fingers = (np.abs(along - 0.05) < 0.016) & (across < 0.016) & (back > -0.012) & (back < 0.05)
        frame = hand_frame(approach, closing, rotation)
        cost = 0.5 * (palm.sum() + fingers.sum()) + np.linalg.norm(rotation_vector(frame @ rotation.T))
        cost += 0.8 * max(0.0, lean[0])  # leaning away from the robot's base strains the wrist
        candidates.append(Grasp(float(cost), position, frame, "tilted"))
    return min(candidates, key=lambda grasp: grasp.cost)


def plan_handle_grasp(points: np.ndarray, origin: np.ndarray, lean: float, rotation: np.ndarray) -> Grasp:
    """A grasp of a mug's handle, the hand leaning outwards by `lean`.

    The handle is where the outermost 12 mm are narrow, far from the origin and symmetric.
    """
    offsets = points[:, :2] - origin[:2]
    best = None
    for angle in np.arange(72) * np.pi / 36:
        direction = np.array([np.cos(angle), np.sin(angle)])
        along = offsets @ direction
        spread = offsets[along > along.max() - 0.012] @ np.array([-direction[1], direction[0]])
        cost = np.ptp(spread) - along.max() + 0.5 * abs(spread.max() + spread.min())
        if best is None or cost < best[0]:
            best = (cost, direction, along.max())
    cost, direction, reach = best
    bar = points[offsets @ direction > reach - 0.014][:, 2]
    handle = np.array([*direction, 0.0])
    position = np.array([*(origin[:2] + direction * (reach - 0.009)), (bar.min() + bar.max()) / 2 + 0.004])
    approach = -np.cos(lean) * UP - np.sin(lean) * handle
    frame = hand_frame(approach, np.cross(UP, handle), rotation)
    return Grasp(float(cost), position, frame, "handle")
