# SPDX-License-Identifier: Apache-2.0
"""Skills of the scripted expert that move free objects: grasp, carry, place, push."""

from collections.abc import Generator

import numpy as np

from worldenv_jax.envs.libero.grasp_planning import UP, Grasp, plan_grasps, plan_tilted_grasp
from worldenv_jax.envs.libero.motion import CLOSE, OPEN, Hand, Motion, SkillFailed
from worldenv_jax.envs.libero.placing import plan_placement, shared_slots
from worldenv_jax.envs.libero.scene import Scene

_CROWDED = 15.0  # cost from which on a grasp from above would hit something
_LIFTED = 0.025  # metres that an object must rise with the hand


class ObjectSkills:
    """Pick and place, and pushing a plate."""

    def __init__(self, scene: Scene, hand: Hand):
        self.scene, self.hand = scene, hand
        self.slots = shared_slots(scene)

    def pick_and_place(self, goal: tuple[str, ...], attempts: int = 3) -> Motion:
        """Makes ("in" or "on", object, receptacle) true.

        Raises:
          SkillFailed: it is still not true after all attempts.
        """
        for _ in range(attempts):
            try:
                rotation = yield from self.grasp(goal[1])
                yield from self.place(goal, rotation)
            except SkillFailed:
                yield from self.hand.wait(3, OPEN)
                yield from self.hand.back_off(0.12 * UP, near=0.04)
                continue
            if not self.scene.holds(goal):
                yield from self.hand.wait(6, OPEN)
            if self.scene.holds(goal):
                return
        raise SkillFailed(f"not reached: {' '.join(goal)}")

    def grasp(self, name: str, attempts: int = 3) -> Generator[np.ndarray, None, np.ndarray]:
        """Takes an object and lifts it by 6 cm; returns the hand's rotation [3, 3] while holding it.

        Raises:
          SkillFailed: it did not come up.
        """
        scene = self.scene
        for attempt in range(attempts):
            points, others = scene.object_points(name), scene.points_beside(scene.bodies(name))
            grasps = plan_grasps(points, others, scene.position(name), scene.hand_rotation)
            if not grasps:
                break
            grasp = grasps[min(2 * attempt, len(grasps) - 1)]
            if grasp.cost > _CROWDED and attempt < 2:
                grasp = plan_tilted_grasp(points, others, scene.hand_rotation) or grasp
            if (yield from self._try_grasp(name, grasp)):
                return grasp.rotation
        raise SkillFailed(f"cannot grasp {name}")

    def _try_grasp(self, name: str, grasp: Grasp) -> Generator[np.ndarray, None, bool]:
        scene, hand = self.scene, self.hand
        tilted = grasp.kind == "tilted"
        before = grasp.position - (0.12 if tilted else 0.1) * grasp.rotation[:, 2]
        far = np.linalg.norm(before[:2] - scene.hand[:2]) > 0.08
        height = max(before[2] + (0.05 if tilted else 0.0), scene.hand[2] if far or tilted else -np.inf)
        over = np.array([*before[:2], height])
        yield from hand.go(over, grasp.rotation, near=0.03, near_angle=0.3, steps=70, gripper=OPEN)
        yield from hand.go(before, grasp.rotation, near=0.01, near_angle=0.07 if tilted else 0.05, steps=50)
        speed = 0.5 if tilted else 0.6
        yield from hand.go(grasp.position, grasp.rotation, near=0.006, near_angle=0.08, speed=speed, patience=10)
        yield from hand.close(scene.hand if tilted else grasp.position, grasp.rotation)
        height = scene.position(name)[2]
        lift = scene.hand + 0.065 * UP
        yield from hand.go(lift, grasp.rotation, near=0.012, near_angle=0.3, speed=0.7, steps=25)
        if scene.position(name)[2] > height + _LIFTED and scene.opening > 0.001:
            return True
        yield from hand.wait(3, OPEN)
        yield from hand.back_off(-0.1 * grasp.rotation[:, 2])
        return False

    def place(self, goal: tuple[str, ...], rotation: np.ndarray) -> Motion:
        """Carries the held object to where the goal wants it, lowers it and lets go.

        Raises:
          SkillFailed: the object was lost on the way.
        """
        name = goal[1]
        scene, hand = self.scene, self.hand
        target, release, travel = plan_placement(scene, goal, self.slots.get(name, 0))
        travel = max(travel, scene.position(name)[2])
        held = lambda: scene.position(name) - scene.hand  # the object slips: measured anew every step
        up = lambda: np.array([*scene.hand[:2], travel - held()[2]])
        over = lambda height: lambda: np.array([*target, height]) - held()
        yield from hand.go(up, rotation, near=0.02, near_angle=0.4, steps=40, gripper=CLOSE)
        yield from hand.go(over(travel), rotation, near=0.012, near_angle=0.2, steps=110)
        if np.linalg.norm(held()) > 0.25:
            raise SkillFailed(f"lost {name}")
        yield from hand.go(over(release), rotation, near=0.008, near_angle=0.3, speed=0.5, steps=60, patience=8)
        yield from hand.wait(5, OPEN)
        yield from hand.back_off(0.1 * UP)

    def push(self, goal: tuple[str, ...], attempts: int = 3) -> Motion:
        """Pinches the rim of a flat object and drags it over the table onto a region.

        Raises:
          SkillFailed: it is not there after all attempts.
        """
        _, name, receptacle = goal
        scene, hand = self.scene, self.hand
        for _ in range(attempts):
            grasp = self._rim_towards(name, scene.region(receptacle).centre)
            before = grasp.position + 0.1 * UP
            yield from hand.go(before, grasp.rotation, near=0.012, near_angle=0.08, gripper=OPEN)
            yield from hand.go(grasp.position, grasp.rotation, near=0.005, near_angle=0.08, speed=0.6, steps=50)
            yield from hand.close(grasp.position, grasp.rotation)
            for _ in range(120):
                way = scene.region(receptacle).centre[:2] - scene.position(name)[:2]
                if np.linalg.norm(way) < 0.01 or scene.opening < 0.002:
                    break
                height = grasp.position[2] + 0.004
                target = np.array([*(scene.hand[:2] + 0.75 * way), height])
                yield hand.toward(target, grasp.rotation, speed=0.6, turn_speed=0.4)
            yield from hand.wait(6, OPEN)
            yield from hand.back_off(0.1 * UP)
            if scene.holds(goal):
                return
        raise SkillFailed(f"not reached: {' '.join(goal)}")

    def _rim_towards(self, name: str, target: np.ndarray) -> Grasp:
        scene = self.scene
        origin = scene.position(name)
        others = scene.points_beside(scene.bodies(name))
        grasps = plan_grasps(scene.object_points(name), others, origin, scene.hand_rotation)
        rims = [grasp for grasp in grasps if grasp.kind == "rim"]
        if not rims:
            raise SkillFailed(f"{name} has no rim to pull")
        way = (target - origin)[:2] / np.linalg.norm((target - origin)[:2])
        return min(rims, key=lambda grasp: grasp.cost - (grasp.position - origin)[:2] @ way / 0.06)
