# SPDX-License-Identifier: Apache-2.0
"""Where a held object has to go: target, height at which to let go, height at which to travel."""

from typing import NamedTuple

import numpy as np

from worldenv_jax.envs.libero.scene import Region, Scene

_SLOT = 0.058  # metres from a region's centre when two objects share it


class Placement(NamedTuple):
    """For the object's body origin."""

    target: np.ndarray  # [2]
    release: float  # height to lower to
    travel: float  # height to cross the table at


def shared_slots(scene: Scene) -> dict[str, int]:
    """Sides (-1 or +1 in y) for pairs of objects that the goal wants on one region, in the order they stand in.

    The dictionary's order is the order to place them in: the far side first, so that nothing passes over a neighbour.
    """
    slots = {}
    goals = [goal for goal in scene.goals() if goal[0] == "on" and scene.has_region(goal[2])]
    for receptacle in sorted({goal[2] for goal in goals}):
        sharing = sorted((g[1] for g in goals if g[2] == receptacle), key=lambda name: scene.position(name)[1])
        if len(sharing) == 2:
            pair = list(zip(sharing, (-1, 1)))
            from_left = np.mean([scene.position(name)[1] for name in sharing]) < scene.region(receptacle).centre[1]
            slots |= reversed(pair) if from_left else pair
    return slots


def plan_placement(scene: Scene, goal: tuple[str, ...], slot: int = 0) -> Placement:
    """Where to put `goal[1]` so that the predicate ("in" or "on", object, receptacle) becomes true.

    Args:
      scene: as it is now, with the object in the hand.
      goal: the predicate.
      slot: side of the region, from `shared_slots`; 0 for its centre.
    """
    relation, name, receptacle = goal
    bottom = scene.position(name)[2] - scene.object_points(name)[:, 2].min()
    if not scene.has_region(receptacle):
        placement = _on_object(scene, receptacle, bottom)
    elif relation == "in":
        placement = _in_region(scene, scene.region(receptacle), bottom)
    else:
        placement = _on_region(scene, name, scene.region(receptacle), bottom, slot)
    passed = _points_on_the_way(scene, name, placement.target)
    travel = max(placement.travel, passed[:, 2].max() + bottom + 0.03) if len(passed) else placement.travel
    return placement._replace(travel=travel)


def _on_object(scene: Scene, receptacle: str, bottom: float) -> Placement:
    centre, points = scene.position(receptacle), scene.object_points(receptacle)
    middle = points[np.linalg.norm(points[:, :2] - centre[:2], axis=1) < 0.04]
    support = middle[:, 2].max() if len(middle) else centre[2]
    return Placement(centre[:2], support + bottom + 0.004, points[:, 2].max() + bottom + 0.08)


def _in_region(scene: Scene, region: Region, bottom: float) -> Placement:
    target, release = region.centre, region.centre[2] - region.half[2] + bottom + 0.02
    if "cabinet" in region.name:
        target = target + _into_open_part(scene, region)
    if "basket" in region.name:  # deep: let go below its rim rather than push down on what lies inside
        release = max(release, region.centre[2] + region.half[2] - 0.04)
    top = scene.object_points(region.parent)[:, 2].max()
    return Placement(target[:2], release, top + bottom + 0.03)


def _into_open_part(scene: Scene, region: Region) -> np.ndarray:
    """Offset [3] from a drawer's centre to the middle of what sticks out of the cabinet."""
    drawer = scene.joint(region.name)
    outwards = -drawer.axis
    base = {
        body
        for body in scene.bodies(region.parent) - {drawer.body}
        if body == scene.env.obj_body_id[region.parent] or "base" in scene.model.body(body).name
    }
    front = (scene.points({drawer.body}) @ outwards).max() - 0.045
    cabinet = (scene.points(base) @ outwards).max()
    shift = (front + cabinet) / 2 - region.centre @ outwards
    return outwards * np.clip(shift, 0.0, 0.8 * region.half @ np.abs(outwards))


def _on_region(scene: Scene, name: str, region: Region, bottom: float, slot: int) -> Placement:
    centre = region.centre + [0.0, slot * min(_SLOT, 0.8 * region.half[1]), 0.0]
    if region.parent in scene.env.obj_body_id:
        base = scene.object_points(region.parent)
    else:
        base = scene.points_beside(scene.bodies(name))
    under = base[(np.abs(base[:, :2] - centre[:2]) < 0.03).all(axis=1)]
    support = under[:, 2].max() if len(under) else centre[2]
    return Placement(centre[:2], support + bottom + 0.006, support + bottom + 0.1)


def _points_on_the_way(scene: Scene, name: str, target: np.ndarray) -> np.ndarray:
    """Points [n, 3] that the object would pass over, other than those right beside its start."""
    points = scene.points_beside(scene.bodies(name))
    start = scene.position(name)[:2]
    length = max(np.linalg.norm(target - start), 1e-6)
    direction = (target - start) / length
    along = (points[:, :2] - start) @ direction
    aside = np.abs((points[:, :2] - start) @ np.array([-direction[1], direction[0]]))
    return points[(along > 0.03) & (along < length) & (aside < 0.09)]
