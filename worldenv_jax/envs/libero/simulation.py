# SPDX-License-Identifier: Apache-2.0
"""One LIBERO task in this process: starts, steps, frames. Physics, controller and predicates are LIBERO's own.

What differs from calling `env.reset()` and `env.step()` is speed and repeatability, not the outcome of a step:

* A control step runs the same 25 MuJoCo steps, to the bit, but computes what depends on positions and velocities once
  in each instead of three times (robosuite's `mj_forward`, the controller's own, and that of `mj_step`); only the
  constraint solver runs as often, because each run starts from the last one's result. Observables are not updated.
* Frames are drawn only when asked for, without reflections and multi-sampling (mean change under 3 of 255 levels,
  2 to 4 times faster in software), and without what lies outside the picture (half of the wrist camera's triangles).
* A start sets *everything* that a step depends on, so an episode does not depend on those before it: joint state,
  solver warm start, the poses of fixtures (cabinets, stoves: they are no joints and no part of a published initial
  state), the gripper command, the controller's posture and its goal. The last matters most: the controller keeps its
  goal rotation while rotation commands are exactly zero, as they are during settling, so without it an episode would
  begin by turning to where the one before ended.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mujoco
import numpy as np

from worldenv_jax.envs.libero import installation
from worldenv_jax.envs.libero.cameras import outside_view, policy_frame, read_cameras
from worldenv_jax.envs.libero.scene import Scene
from worldenv_jax.envs.protocol import libero_protocol, start_seed
from worldenv_jax.types import Camera, EpisodeSpec

_PHYSICS_STEPS = 25  # of 2 ms: one control step at 20 Hz
_SHIFT_DRAWS = 40  # draws before a shifted start is given up
_FULL_SHIFT_DRAWS = 10  # later draws are smaller by 15 % each
_NO_ROTATION = (1, 0, 0, 0)
_STILL_DISTANCE = 0.01  # metres: a shifted scene must come to rest where it was put ...
_STILL_COSINE = 0.985  # ... and upright to within 10 degrees
_UNDRAWN_GROUP = 5  # of shapes: robosuite draws groups 1 and 2


class Start(NamedTuple):
    """Everything that LIBERO leaves open about the start of an episode, before the settling steps."""

    state: np.ndarray  # float64 [1 + nq + nv]: time, joint positions, joint velocities
    fixtures: np.ndarray  # float64 [F, 7]: position and quaternion (w first) of every fixture


class Simulation:
    """One task of one suite; holds one MuJoCo model and, when it draws, one GL context."""

    def __init__(self, suite: str, task: int, image_size: int, cameras: tuple[str, ...]):
        envs = installation.import_simulator(draw=bool(cameras))
        from robosuite import load_controller_config

        self.suite, self.task = suite, task
        self.protocol = libero_protocol(suite)
        self.image_size, self.cameras = image_size, cameras
        bddl = str(installation.bddl_file(suite, task))
        with contextlib.redirect_stdout(io.StringIO()):
            problem = envs.bddl_utils.get_problem_info(bddl)["problem_name"]
            np.random.seed(self.protocol.environment_seed)
            self.env = envs.TASK_MAPPING[problem](
                bddl,
                robots=["Panda"],
                controller_configs=load_controller_config(default_controller="OSC_POSE"),
                initialization_noise="default",  # N(0, 0.02 rad) on the joints, as in the published states
                use_camera_obs=False,
                has_offscreen_renderer=bool(cameras),
                control_freq=self.protocol.control_hz,
                ignore_done=True,
                hard_reset=False,
            )
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self._fixture_bodies = [self.env.obj_body_id[name] for name in sorted(self.env.fixtures_dict)]
        self._test_fixtures = self._reset(self.protocol.environment_seed).fixtures
        self._initial_states = installation.initial_states(suite, task)
        if cameras:
            self._draw_plainly()

    def close(self) -> None:
        """Frees the model and the GL context."""
        self.env.close()

    # -- starts ---------------------------------------------------------------------------------------------------

    def begin(self, spec: EpisodeSpec) -> Start:
        """Puts the scene into the start of an episode, settled; returns the state before settling."""
        official = spec._replace(starts="official")
        if spec.split == "test":
            start = Start(self._initial_states[spec.seed % len(self._initial_states)], self._test_fixtures)
        else:
            start = self._reset(start_seed(self.suite, official))
        if spec.starts == "shifted":
            return self._begin_shifted(start, np.random.default_rng(start_seed(self.suite, spec)))
        self._settle(start)
        return start

    def _reset(self, seed: int) -> Start:
        """Draws a start from the task's placement regions.

        LIBERO reads from the scene where an object on a fixture goes, and takes it for relative to the fixture: right
        in a scene just loaded, where fixtures are at the origin.
        """
        from robosuite.utils.errors import RandomizationError

        self.model.body_pos[self._fixture_bodies] = 0
        self.model.body_quat[self._fixture_bodies] = _NO_ROTATION
        np.random.seed(seed)  # robosuite draws from NumPy's global generator
        for _ in range(20):
            with contextlib.suppress(RandomizationError):
                self.env.reset()
                break
        bodies = self._fixture_bodies
        fixtures = np.concatenate([self.model.body_pos[bodies], self.model.body_quat[bodies]], axis=1)
        return Start(self.env.sim.get_state().flatten(), fixtures)

    def _settle(self, start: Start) -> None:
        self.env.sim.reset()
        self.model.body_pos[self._fixture_bodies] = start.fixtures[:, :3]
        self.model.body_quat[self._fixture_bodies] = start.fixtures[:, 3:]
        self.env.sim.set_state_from_flattened(start.state)
        mujoco.mj_forward(self.model, self.data)
        self.robot.gripper.current_action = np.zeros_like(self.robot.gripper.current_action)
        self.robot.controller.update_initial_joints(self.robot.init_qpos)  # resets the goal, too
        for _ in range(self.protocol.settle_steps):
            self.step(np.array(self.protocol.settle_action))

    def _begin_shifted(self, start: Start, rng: np.random.Generator) -> Start:
        """Moves target and receptacle in x and y and the arm's joints, such that the scene still stands.

        Objects only: fixtures stay where the start has them. What an object touches (the box it stands on) moves
        with it.

        Raises:
          RuntimeError: no draw left the scene standing.
        """
        self._settle(start)
        movable = sorted(self.env.objects_dict)
        groups = self._shifted_groups()
        bodies = [self.env.obj_body_id[name] for name in movable]
        addresses = [self.model.joint(self.env.objects_dict[name].joints[-1]).qposadr[0] for name in movable]
        rest_position, rest_up = self.data.xpos[bodies].copy(), self.data.xmat[bodies][:, 6:9].copy()
        for draw in range(_SHIFT_DRAWS):
            half = self.protocol.shift_position * 0.85 ** max(0, draw - _FULL_SHIFT_DRAWS)
            offsets = np.zeros((len(movable), 3))
            for group in groups:
                offsets[[movable.index(name) for name in group], :2] = rng.uniform(-half, half, 2)
            state = start.state.copy()
            for offset, address in zip(offsets, addresses):
                state[1 + address : 1 + address + 3] += offset
            joints = 1 + np.array(self.robot._ref_joint_pos_indexes)
            state[joints] += rng.normal(0.0, self.protocol.shift_joints, len(joints))
            self._settle(start._replace(state=state))
            moved = np.linalg.norm(self.data.xpos[bodies] - rest_position - offsets, axis=1)
            upright = np.sum(self.data.xmat[bodies][:, 6:9] * rest_up, axis=1)
            if moved.max() < _STILL_DISTANCE and upright.min() > _STILL_COSINE:
                return start._replace(state=state)
        raise RuntimeError(f"{self.suite} task {self.task}: no shifted start leaves the scene standing")

    def _shifted_groups(self) -> list[set[str]]:
        """The movable objects that the goal names, directly or through a region, each with those it touches."""
        objects, sites = self.env.objects_dict.keys(), self.env.object_sites_dict
        names = {name for goal in self.env.parsed_problem["goal_state"] for name in goal[1:]}
        names |= {sites[name].parent_name for name in names if name in sites}
        owner = {body: name for name in objects for body in Scene(self.env).bodies(name)}
        bodies = self.model.geom_bodyid[self.data.contact.geom]
        touching = [{owner.get(first), owner.get(second)} for first, second in bodies]
        groups = []
        for name in sorted(names & objects):
            if not any(name in group for group in groups):
                groups.append({name}.union(*(pair for pair in touching if name in pair)) - {None})
        return groups

    # -- steps and frames -----------------------------------------------------------------------------------------

    def step(self, action: np.ndarray) -> bool:
        """One control step; returns whether the task predicate holds after it.

        Args:
          action: environment action [7]; clipped to [-1, 1].
        """
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        with self._nothing_moved():
            for substep in range(_PHYSICS_STEPS):
                mujoco.mj_forward(self.model, self.data)
                self.env._pre_action(action, policy_step=substep == 0)
                mujoco.mj_step2(self.model, self.data)
        self.env._post_process()
        return self.success()

    @contextlib.contextmanager
    def _nothing_moved(self) -> Iterator[None]:
        """The controller's own `forward` finds everything computed: only the solver goes on."""
        self.env.sim.forward = lambda: mujoco.mj_fwdConstraint(self.model, self.data)
        try:
            yield
        finally:
            del self.env.sim.forward  # the class has the whole one

    def success(self) -> bool:
        """The task predicate in the present state."""
        return bool(self.env._check_success())

    def images(self, cameras: Sequence[str]) -> np.ndarray:
        """The present views of some of `cameras`, uint8 [V, H, W, 3], turned as policies see them."""
        return self._views(cameras, self.image_size)

    def photographs(self, size: int) -> np.ndarray:
        """The present views of all cameras at another resolution, uint8 [V, size, size, 3], turned like `images`."""
        return self._views(self.cameras, size)

    def _views(self, cameras: Sequence[str], size: int) -> np.ndarray:
        frames = [policy_frame(self._draw(name, size)) for name in cameras]
        return np.array(frames, np.uint8).reshape(-1, size, size, 3)

    def _draw(self, camera: str, size: int) -> np.ndarray:
        """The raw frame of one camera, uint8 [H, W, 3], bottom row first; skips shapes that are not in the picture."""
        groups = self.model.geom_group.copy()
        self.model.geom_group[outside_view(self.model, self.data, camera)] = _UNDRAWN_GROUP
        try:
            return self.env.sim.render(size, size, camera_name=camera)
        finally:
            self.model.geom_group[:] = groups

    def camera(self, cameras: Sequence[str]) -> Camera:
        """Those of `images`; leaves float32 [V, 3, 3] and [V, 4, 4]."""
        return read_cameras(self.model, self.data, cameras, self.image_size)

    def proprio(self) -> np.ndarray:
        """Position (3, m), axis-angle (3, rad), finger positions (2, m) as robosuite observes them; float32 [8]."""
        from robosuite.utils.transform_utils import convert_quat, quat2axisangle

        position = self.data.site_xpos[self.robot.eef_site_id]
        quaternion = convert_quat(self.data.body("robot0_right_hand").xquat.copy(), to="xyzw")
        fingers = self.data.qpos[self.robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, quat2axisangle(quaternion), fingers]).astype(np.float32)

    def _draw_plainly(self) -> None:
        context = self.env.sim._render_context_offscreen
        context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.model.vis.quality.offsamples = 0
        context.con.free()
        context._set_mujoco_context_and_buffers()
