# SPDX-License-Identifier: Apache-2.0
"""Skills of the scripted expert for drawers, doors, knobs and the microwave."""

from collections.abc import Callable, Generator

import numpy as np

from worldenv_jax.envs.libero.grasp_planning import (
    UP,
    Grasp,
    hand_collisions,
    hand_frame,
    nearest_turn,
    plan_handle_grasp,
    pointing_down,
)
from worldenv_jax.envs.libero.motion import CLOSE, OPEN, Hand, Motion, SkillFailed
from worldenv_jax.envs.libero.scene import Joint, Scene

_SHUT = -0.10  # metres: a drawer that is less open than this must be opened before something goes in
_OPEN_ENOUGH, _PULL_TO = -0.138, -0.155  # LIBERO calls a drawer open from -0.14
_PULL_TILTS = np.deg2rad([85, 70, 50])  # of the hand from pointing down, tried in this order
_PUSH_TILT, _MUG_LEAN = np.deg2rad(32), np.deg2rad(42)
_KNOB_ON = 0.9  # rad
_KNOB_ANGLES = np.arange(24) * np.pi / 24


class ArticulatedSkills:
    """Opening, closing, turning, and putting a mug behind a door."""

    def __init__(self, scene: Scene, hand: Hand):
        self.scene, self.hand = scene, hand

    def is_shut(self, region: str) -> bool:
        """Whether a drawer is not open far enough to put something in."""
        return self.scene.joint(region).value > _SHUT

    # -- drawers --------------------------------------------------------------------------------------------------

    def open_drawer(self, name: str) -> Motion:
        """Pulls a drawer by its handle.

        Raises:
          SkillFailed: no way of holding the handle moved it far enough.
        """
        scene, hand = self.scene, self.hand
        joint = scene.joint(name)
        outwards = -joint.axis
        handle = self._handle(joint, outwards)
        for tilt in _PULL_TILTS:
            approach = -np.cos(tilt) * UP - np.sin(tilt) * outwards
            closing = np.cross(np.cross(approach, UP), approach)  # the most vertical direction across the handle
            rotation = hand_frame(approach, closing / np.linalg.norm(closing), scene.hand_rotation)
            before = handle() + 0.13 * outwards + 0.06 * UP
            above = np.array([*(before + 0.05 * outwards)[:2], max(scene.hand[2], before[2] + 0.05)])
            yield from hand.go(above, rotation, near=0.04, near_angle=0.5, steps=60, gripper=OPEN)
            yield from hand.go(before, rotation, near=0.02, near_angle=0.2, steps=50)
            yield from hand.go(handle() + 0.05 * outwards, rotation, near=0.012, near_angle=0.12, steps=50)
            inside = handle() - 0.004 * outwards
            yield from hand.go(inside, rotation, near=0.006, near_angle=0.15, speed=0.5, steps=40, patience=10)
            yield from hand.close(scene.hand, rotation)
            yield from self._pull(joint, handle, outwards, rotation)
            opened = joint.value < _OPEN_ENOUGH
            yield from hand.wait(5, OPEN)
            yield from hand.back_off(0.07 * outwards, near=0.02)
            yield from hand.back_off(0.14 * UP, steps=25)
            if opened:
                return
        raise SkillFailed(f"{name} does not open")

    def _pull(
        self, joint: Joint, handle: Callable[[], np.ndarray], outwards: np.ndarray, rotation: np.ndarray
    ) -> Motion:
        first = joint.value
        for step in range(60):
            if joint.value <= _PULL_TO or (step > 15 and abs(joint.value - first) < 0.005):
                return
            target = self.scene.hand + 0.06 * outwards
            target[2] = handle()[2]
            yield self.hand.toward(target, rotation, turn_speed=0.4, gain=1.3)

    def close_drawer(self, goal: tuple[str, ...]) -> Motion:
        """Pushes a drawer shut with the closed, leaning hand."""
        scene, hand = self.scene, self.hand
        joint = scene.joint(goal[1])
        outwards = -joint.axis
        handle = self._handle(joint, outwards)
        approach = -np.cos(_PUSH_TILT) * UP - np.sin(_PUSH_TILT) * outwards
        rotation = hand_frame(approach, np.cross(outwards, UP), scene.hand_rotation)
        before = handle() + 0.11 * outwards
        above = np.array([*before[:2], max(scene.hand[2], handle()[2] + 0.2)])
        yield from hand.go(above, rotation, near=0.03, near_angle=0.4, gripper=CLOSE)
        yield from hand.go(before + 0.012 * UP, rotation, near=0.02, near_angle=0.15, steps=60)
        for _ in range(80):
            if scene.holds(goal):
                break
            target = handle() - 0.03 * outwards + 0.012 * UP
            yield hand.toward(target, rotation, speed=0.6, turn_speed=0.4)
        yield from hand.go(scene.hand + 0.07 * outwards, near=0.02, steps=15)
        yield from hand.back_off(0.12 * UP)

    def _handle(self, joint: Joint, outwards: np.ndarray) -> Callable[[], np.ndarray]:
        """Where a drawer's handle is: its shape farthest out."""
        scene = self.scene
        geoms = scene.collision_geoms(scene.subtree(joint.body))
        handle = max(geoms, key=lambda geom: scene.data.geom_xpos[geom] @ outwards)
        return lambda: scene.data.geom_xpos[handle].copy()

    # -- knob and door --------------------------------------------------------------------------------------------

    def turn_knob(self, goal: tuple[str, ...], attempts: int = 3) -> Motion:
        """Grasps a stove's knob from above and turns it on.

        Raises:
          SkillFailed: it cannot be grasped, or is not on after all attempts.
        """
        scene, hand = self.scene, self.hand
        joint = scene.joint(goal[1])
        for _ in range(attempts):
            grasp = self._knob_grasp(joint)
            yield from hand.go(grasp.position + 0.1 * UP, grasp.rotation, near=0.02, near_angle=0.1, gripper=OPEN)
            yield from hand.go(grasp.position, grasp.rotation, near=0.006, near_angle=0.1, speed=0.6, steps=50)
            yield from hand.close(grasp.position, grasp.rotation)
            angle = np.arctan2(grasp.rotation[1, 0], grasp.rotation[0, 0])
            for step in range(60):
                if joint.value > _KNOB_ON:
                    break
                turned = pointing_down(angle + min(0.06 * (step + 1), 1.6))
                yield hand.toward(grasp.position, turned, speed=0.4)
            yield from hand.wait(5, OPEN)
            yield from hand.back_off(0.12 * UP)
            if scene.holds(goal):
                return
        raise SkillFailed(f"{goal[1]} is not on")

    def _knob_grasp(self, joint: Joint) -> Grasp:
        scene = self.scene
        knob, others = scene.subtree(joint.body), scene.points_beside(scene.subtree(joint.body))
        points = scene.points(knob)
        grasps = []
        for height in points[:, 2].max() - np.array([0.012, 0.018]):
            slab = points[points[:, 2] > height - 0.008][:, :2]
            position = np.array([*((slab.min(axis=0) + slab.max(axis=0)) / 2), height])
            for angle in _KNOB_ANGLES:
                width = np.ptp(slab @ np.array([np.cos(angle), np.sin(angle)]))
                turn = nearest_turn(angle, scene.finger_angle)
                cost = 10 * width + 0.5 * abs(turn - scene.finger_angle)
                cost += 3 * hand_collisions(position, turn, others)
                if width <= 0.075:
                    grasps.append(Grasp(cost, position, pointing_down(turn), "straddle"))
        if not grasps:
            raise SkillFailed("the knob is too wide for the hand")
        return min(grasps, key=lambda grasp: grasp.cost)

    def close_door(self, goal: tuple[str, ...]) -> Motion:
        """Sweeps a door shut with the closed hand along the door's arc."""
        scene, hand = self.scene, self.hand
        joint = scene.joint(goal[1])
        points, hinge, first = scene.points(scene.subtree(joint.body)), joint.anchor, joint.value
        offsets = points[:, :2] - hinge[:2]
        radius = 0.8 * np.linalg.norm(offsets, axis=1).max()
        heading = np.arctan2(*offsets.mean(axis=0)[::-1])
        closing = 1.0 if first < 0 else -1.0

        def pose_at(value: float, clearance: float) -> tuple[np.ndarray, np.ndarray]:
            """Where the hand must be to stand `clearance` outside the door at joint position `value`."""
            angle = heading + value - first
            along = np.array([np.cos(angle), np.sin(angle)])
            outside = closing * np.array([along[1], -along[0]])
            position = np.array([*(hinge[:2] + radius * along + clearance * outside), points[:, 2].max() - 0.05])
            return position, pointing_down(nearest_turn(angle, scene.home_angle))

        start, rotation = pose_at(first, 0.07)
        yield from hand.go(start + 0.18 * UP, rotation, near=0.04, near_angle=0.4, steps=90, gripper=CLOSE)
        yield from hand.go(start, rotation, near=0.03, near_angle=0.3, steps=60)
        for _ in range(140):
            if scene.holds(goal):
                return
            ahead = min(joint.value + 0.25, 0.12) if closing > 0 else max(joint.value - 0.25, -0.12)
            target, rotation = pose_at(ahead, 0.012)
            yield hand.toward(target, rotation, speed=0.7, turn_speed=0.4)
        raise SkillFailed(f"{goal[1]} does not close")

    # -- microwave ------------------------------------------------------------------------------------------------

    def insert_mug(self, goal: tuple[str, ...], attempts: int = 2) -> Motion:
        """Takes a mug by its handle, hand leaning, and slides it into the microwave (which faces -y).

        Raises:
          SkillFailed: it is not inside after all attempts.
        """
        _, name, receptacle = goal
        scene, hand = self.scene, self.hand
        inwards = np.array([0.0, 1.0, 0.0])
        approach = -np.cos(_MUG_LEAN) * UP + np.sin(_MUG_LEAN) * inwards
        for _ in range(attempts):
            held = yield from self._take_by_handle(name)
            if not held:
                continue
            region = scene.region(receptacle)
            shell = {b for b in scene.bodies(region.parent) if "door" not in scene.model.body(b).name}
            front = scene.points(shell)[:, 1].min()
            rotation = hand_frame(approach, np.array([1.0, 0.0, 0.0]), scene.hand_rotation)
            floor = region.centre[2] - region.half[2]
            inside = np.array([region.centre[0] - 0.04, region.centre[1] - 0.012, floor + 0.03])
            outside = np.array([inside[0], front - 0.11, inside[2]])
            bring = lambda target: lambda: target - (scene.position(name) - scene.hand)
            yield from hand.go(bring(outside), rotation, near=0.015, near_angle=0.12, speed=0.7, steps=90)
            yield from hand.go(bring(inside), rotation, near=0.012, near_angle=0.2, speed=0.5, steps=70)
            lowered = bring(inside - 0.02 * UP)
            yield from hand.go(lowered, rotation, near=0.006, near_angle=0.3, speed=0.3, steps=25, patience=6)
            yield from hand.wait(8, OPEN)
            yield from hand.back_off(-0.16 * inwards + 0.01 * UP, steps=30, near=0.02)
            yield from hand.back_off(-0.05 * inwards + 0.15 * UP, steps=25, near=0.04)
            if scene.holds(goal):
                return
        raise SkillFailed(f"not reached: {' '.join(goal)}")

    def _take_by_handle(self, name: str) -> Generator[np.ndarray, None, bool]:
        """Grasps a mug by its handle and lifts it; returns whether it came up."""
        scene, hand = self.scene, self.hand
        points, origin = scene.object_points(name), scene.position(name)
        grasp = plan_handle_grasp(points, origin, _MUG_LEAN, scene.hand_rotation)
        approach = grasp.rotation[:, 2]
        above = grasp.position - 0.12 * approach + 0.1 * UP
        yield from hand.go(above, grasp.rotation, near=0.03, near_angle=0.3, gripper=OPEN)
        before = grasp.position - 0.1 * approach
        yield from hand.go(before, grasp.rotation, near=0.012, near_angle=0.08, steps=60)
        yield from hand.go(
            grasp.position, grasp.rotation, near=0.006, near_angle=0.08, speed=0.5, steps=50, patience=10
        )
        yield from hand.close(scene.hand, grasp.rotation)
        lifted = lambda: scene.hand + UP * (origin[2] + 0.075 - scene.position(name)[2])
        yield from hand.go(lifted, grasp.rotation, near=0.012, speed=0.6, steps=40)
        if scene.position(name)[2] > origin[2] + 0.03:
            return True
        yield from hand.wait(3, OPEN)
        yield from hand.back_off(-0.1 * approach, near=0.02)
        return False
