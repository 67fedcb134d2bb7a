# SPDX-License-Identifier: Apache-2.0
"""What the scripted expert knows of a scene: poses, collision shapes as points, regions, joints, goals.

Everything is read from the running simulator (privileged information). Lengths in metres, angles in radians, points
and rotations in world axes. The hand's frame is robosuite's grip site: z along the approach, x along the direction in
which the fingers close.
"""

import mujoco
import numpy as np

_SURFACE_SPACING = 0.01  # between the points that stand for a collision shape


class Joint:
    """The hinge or slide of a drawer, door or knob."""

    def __init__(self, scene: "Scene", name: str):
        self.scene = scene
        self.id = scene.model.joint(name).id
        self.body = int(scene.model.jnt_bodyid[self.id])
        self.slides = scene.model.jnt_type[self.id] == mujoco.mjtJoint.mjJNT_SLIDE

    @property
    def value(self) -> float:
        """Joint position (m or rad)."""
        return float(self.scene.data.qpos[self.scene.model.jnt_qposadr[self.id]])

    @property
    def axis(self) -> np.ndarray:
        """Unit axis [3]."""
        return self.scene.data.xaxis[self.id].copy()

    @property
    def anchor(self) -> np.ndarray:
        """A point [3] on the axis."""
        return self.scene.data.xanchor[self.id].copy()


class Region:
    """A box that a goal refers to ("in the basket", "on the stove")."""

    def __init__(self, scene: "Scene", name: str):
        site = scene.env.object_sites_dict[name]
        index = scene.model.site(name).id
        self.name, self.parent = name, site.parent_name
        self.centre = scene.data.site_xpos[index].copy()
        rotation = scene.data.site_xmat[index].reshape(3, 3)
        self.half = np.abs(rotation * np.array(site.size)).sum(axis=1)  # of the enclosing upright box [3]


class Scene:
    """Read access to one LIBERO environment."""

    def __init__(self, env):
        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        names = [self.model.body(body).name for body in range(self.model.nbody)]
        self.robot = {b for b, name in enumerate(names) if name.startswith(("robot0", "gripper0", "mount0"))}
        self.home_angle = self.finger_angle  # at the start, where the wrist is far from its limits
        self._shapes: dict[int, np.ndarray] = {}

    # -- hand -----------------------------------------------------------------------------------------------------

    @property
    def hand(self) -> np.ndarray:
        """Position of the grip site [3]."""
        return self.data.site_xpos[self.env.robots[0].eef_site_id].copy()

    @property
    def hand_rotation(self) -> np.ndarray:
        """Rotation of the grip site [3, 3]."""
        return self.data.site_xmat[self.env.robots[0].eef_site_id].reshape(3, 3).copy()

    @property
    def finger_angle(self) -> float:
        """Heading of the closing direction in the horizontal plane."""
        x = self.hand_rotation[:, 0]
        return float(np.arctan2(x[1], x[0]))

    @property
    def opening(self) -> float:
        """Distance between the fingers."""
        return float(np.abs(self.data.qpos[self.env.robots[0]._ref_gripper_joint_pos_indexes]).sum())

    # -- objects --------------------------------------------------------------------------------------------------

    def position(self, name: str) -> np.ndarray:
        """Body origin of an object or fixture [3]."""
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def subtree(self, body: int) -> set[int]:
        """A body and all bodies attached to it."""
        bodies = {body}
        for child in range(body + 1, self.model.nbody):
            if self.model.body_parentid[child] in bodies:
                bodies.add(child)
        return bodies

    def bodies(self, name: str) -> set[int]:
        """All bodies of an object or fixture."""
        return self.subtree(self.env.obj_body_id[name])

    def points(self, bodies: set[int]) -> np.ndarray:
        """Points [n, 3] on the collision shapes of some bodies."""
        clouds = [np.zeros((0, 3))]
        for geom in self.collision_geoms(bodies):
            if geom not in self._shapes:
                self._shapes[geom] = self._surface(geom)
            rotation = self.data.geom_xmat[geom].reshape(3, 3)
            clouds.append(self._shapes[geom] @ rotation.T + self.data.geom_xpos[geom])
        return np.concatenate(clouds)

    def collision_geoms(self, bodies: set[int]) -> list[int]:
        """Ids of the geoms of some bodies that can be touched."""
        model = self.model
        touch = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        candidates = np.flatnonzero(touch & (model.geom_group == 0))
        return [int(geom) for geom in candidates if model.geom_bodyid[geom] in bodies]

    def object_points(self, name: str) -> np.ndarray:
        """Points [n, 3] on an object."""
        return self.points(self.bodies(name))

    def points_beside(self, bodies: set[int]) -> np.ndarray:
        """Points [n, 3] on everything but some bodies and the robot."""
        return self.points(set(range(1, self.model.nbody)) - bodies - self.robot)

    def _surface(self, geom: int) -> np.ndarray:
        """Points on one collision shape in its own axes."""
        kind, size = self.model.geom_type[geom], self.model.geom_size[geom]
        if kind == mujoco.mjtGeom.mjGEOM_BOX:
            return _box_surface(size)
        if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            cube = _box_surface(np.full(3, size[0]))
            return cube / np.linalg.norm(cube, axis=1, keepdims=True) * size[0]
        if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
            turn, height = np.meshgrid(np.arange(16) * np.pi / 8, np.linspace(-size[1], size[1], 5))
            return np.stack([size[0] * np.cos(turn), size[0] * np.sin(turn), height], axis=-1).reshape(-1, 3)
        if kind == mujoco.mjtGeom.mjGEOM_MESH:
            mesh = self.model.geom_dataid[geom]
            first = self.model.mesh_vertadr[mesh]
            return self.model.mesh_vert[first : first + self.model.mesh_vertnum[mesh]].astype(np.float64)
        return np.zeros((0, 3))

    # -- goals ----------------------------------------------------------------------------------------------------

    def goals(self) -> list[tuple[str, ...]]:
        """The goal's predicates, all of which must hold, as (name, *arguments)."""
        return [(goal[0].lower(), *goal[1:]) for goal in self.env.parsed_problem["goal_state"]]

    def holds(self, goal: tuple[str, ...]) -> bool:
        """Whether one predicate holds now."""
        return bool(self.env._eval_predicate(list(goal)))

    def has_region(self, name: str) -> bool:
        """Whether `name` is a region rather than an object."""
        return name in self.env.object_sites_dict

    def region(self, name: str) -> Region:
        """A region as it lies now."""
        return Region(self, name)

    def joint(self, name: str) -> Joint:
        """The joint of a region (a drawer's) or of a fixture (a door's, a knob's)."""
        owner = self.env.object_sites_dict[name] if self.has_region(name) else self.env.get_object(name)
        return Joint(self, owner.joints[0])


def _box_surface(half: np.ndarray) -> np.ndarray:
    """Points [n, 3] on a box with the given half sizes."""
    grids = [np.linspace(-h, h, int(np.clip(np.ceil(2 * h / _SURFACE_SPACING) + 1, 3, 60))) for h in half]
    x, y, z = (axis.ravel() for axis in np.meshgrid(*grids, indexing="ij"))
    points = np.stack([x, y, z], axis=1)
    return points[(np.abs(points) >= np.asarray(half) * (1 - 1e-9)).any(axis=1)]


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis-angle vector [3] of a rotation matrix [3, 3]."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, rotation.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
