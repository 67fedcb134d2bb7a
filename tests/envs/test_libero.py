# SPDX-License-Identifier: Apache-2.0
"""The real LIBERO simulator behind `LiberoEnvironment`, against LIBERO's own stepping, rendering and states."""

import os
import signal

import numpy as np
import pytest

from worldenv_jax.data.episodes import episodes_equal, validate_episode
from worldenv_jax.envs.base import EpisodeError
from worldenv_jax.envs.libero import LiberoEnvironment, installation
from worldenv_jax.envs.libero.cameras import outside_view
from worldenv_jax.envs.runner import run_episodes
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.simulator import Kinematics, advance_proprio
from worldenv_jax.types import EpisodeSpec

pytest.importorskip("mujoco", reason="LIBERO is not installed: make libero")
from worldenv_jax.envs.libero.simulation import Simulation  # noqa: E402

pytestmark = pytest.mark.libero
SUITE, TASK, SIZE = "libero_object", 7, 64


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Skips where the simulator or its assets are absent, saying which."""
    try:
        installation.assets_folder()
        installation.gl_backend()
    except WorldEnvError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def simulation(installed):
    """One task with both cameras, in this process."""
    simulation = Simulation(SUITE, TASK, SIZE, ("agentview", "robot0_eye_in_hand"))
    yield simulation
    simulation.close()


@pytest.fixture(scope="module")
def environment(installed):
    """Two worker processes."""
    environment = LiberoEnvironment(SUITE, SIZE, num_slots=2)
    yield environment
    environment.close()


def random_actions(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (*shape, 7)).astype(np.float32)


def test_steps_are_to_the_bit_those_of_libero(simulation):
    actions = random_actions(30)
    actions[:15, 2], actions[10:, 6] = -1, 1  # down to the table, where there are contacts, then close
    trajectories = []
    for step in (simulation.step, lambda action: simulation.env.step(np.float64(action))):
        simulation.begin(EpisodeSpec(TASK, 3, "test", "official"))
        trajectory = []
        for action in actions:
            step(action)
            trajectory.append(simulation.env.sim.get_state().flatten()[1:])
        trajectories.append(trajectory)
    np.testing.assert_array_equal(*trajectories)


def test_official_test_starts_are_the_published_states(simulation):
    published = installation.initial_states(SUITE, TASK)
    assert published.shape[0] == 50
    start = simulation.begin(EpisodeSpec(TASK, 49, "test", "official"))
    np.testing.assert_array_equal(start.state, published[49])


def test_train_starts_are_none_of_the_published_ones(simulation):
    published = installation.initial_states(SUITE, TASK)
    starts = [simulation.begin(EpisodeSpec(TASK, seed, "train", "official")).state for seed in range(4)]
    for start in starts:
        assert np.abs(published[:, 1:] - start[1:]).max(axis=1).min() > 1e-3
    assert len({start.tobytes() for start in starts}) == 4


@pytest.mark.parametrize("suite, task", [("libero_spatial", 4), ("libero_spatial", 7), ("libero_goal", 8)])
def test_train_starts_put_objects_where_the_published_ones_have_them(installed, suite, task):
    """In drawers, on stoves and cabinets: as high as there, whatever was drawn before."""
    simulation = Simulation(suite, task, SIZE, ())
    objects = simulation.env.objects_dict
    heights = [1 + simulation.model.joint(objects[name].joints[-1]).qposadr[0] + 2 for name in sorted(objects)]
    published = installation.initial_states(suite, task)[:, heights]
    for seed in range(3):
        drawn = simulation.begin(EpisodeSpec(task, seed, "train", "official")).state[heights]
        assert (drawn > published.min(axis=0) - 0.02).all() and (drawn < published.max(axis=0) + 0.02).all()
    simulation.close()


@pytest.mark.parametrize("split", ["train", "test"])
def test_shifted_starts_move_goal_objects_and_arm_only(simulation, split):
    official = simulation.begin(EpisodeSpec(TASK, 5, split, "official")).state
    shifted = simulation.begin(EpisodeSpec(TASK, 5, split, "shifted")).state
    moved = np.flatnonzero(np.abs(shifted - official) > 1e-9)
    model = simulation.model
    goal = [1 + model.joint(f"{name}_joint0").qposadr[0] + axis for name in ("milk_1", "basket_1") for axis in (0, 1)]
    arm = [1 + model.joint(f"robot0_joint{joint}").qposadr[0] for joint in range(1, 8)]
    assert set(moved) == set(goal) | set(arm)
    assert np.abs(shifted - official)[goal].max() <= 0.03
    assert 0.002 < np.std((shifted - official)[arm]) < 0.06


def test_an_episode_does_not_depend_on_the_one_before(simulation):
    spec, actions = EpisodeSpec(TASK, 0, "test", "official"), random_actions(12)

    def run() -> np.ndarray:
        simulation.begin(spec)
        for action in actions:
            simulation.step(action)
        return simulation.env.sim.get_state().flatten()

    first = run()
    simulation.begin(EpisodeSpec(TASK, 9, "train", "shifted"))
    for _ in range(20):
        simulation.step([0, 0, 0.2, 1, 1, -1, 1])  # turns the hand, which a zero command would then hold
    np.testing.assert_array_equal(run(), first)


def test_images_are_the_raw_frames_turned_by_180_degrees(simulation):
    simulation.begin(EpisodeSpec(TASK, 0))
    raw = simulation.env.sim.render(SIZE, SIZE, camera_name="agentview")
    np.testing.assert_array_equal(simulation.images(simulation.cameras)[0], np.rot90(raw, 2))


def test_photographs_are_the_views_at_another_resolution(simulation):
    simulation.begin(EpisodeSpec(TASK, 0))
    before = simulation.images(simulation.cameras)
    photographs = simulation.photographs(4 * SIZE)
    assert photographs.shape == (2, 4 * SIZE, 4 * SIZE, 3) and photographs.dtype == np.uint8
    coarse = photographs.reshape(2, SIZE, 4, SIZE, 4, 3).mean((2, 4))  # coarse pixels miss the lines between tiles
    error = lambda images: np.abs(coarse - images).mean((1, 2, 3))
    assert error(before).max() < 8 < 15 < min(error(before[:, :, ::-1]).min(), error(before[::-1]).min())
    np.testing.assert_array_equal(simulation.images(simulation.cameras), before)


def test_recorded_episodes_have_photographs_of_their_start(installed, simulation):
    spec = EpisodeSpec(TASK, 1)
    simulation.begin(spec)
    expected = simulation.photographs(96)
    environment = LiberoEnvironment(SUITE, SIZE, num_slots=1, photograph_size=96)
    try:
        demonstration = next(environment.expert_episodes([spec], 0.0))
        act = lambda images, *_: np.zeros((len(images), 8, 7), np.float32)
        (_, outcome), *_ = run_episodes(environment, act, [spec], record=True, max_steps=8)
    finally:
        environment.close()
    for episode in (demonstration, outcome.episode):
        np.testing.assert_array_equal(episode.photographs, expected)
    with pytest.raises(ValueError, match="no view to photograph"):
        LiberoEnvironment(SUITE, SIZE, views=(), photograph_size=96)


def test_images_lack_nothing_that_is_in_the_picture(simulation):
    """What is drawn without the shapes outside the view is to the bit what is drawn with them."""
    simulation.begin(EpisodeSpec(TASK, 0))
    for action in random_actions(12):
        for _ in range(4):
            simulation.step(action)
        raw = [simulation.env.sim.render(SIZE, SIZE, camera_name=name) for name in simulation.cameras]
        np.testing.assert_array_equal(simulation.images(simulation.cameras), np.rot90(raw, 2, axes=(1, 2)))
        skipped = [outside_view(simulation.model, simulation.data, name).sum() for name in simulation.cameras]
        assert min(skipped) > 5


def segmentation(simulation: Simulation, camera: str) -> np.ndarray:
    """Geom id per pixel of a policy image, -1 where there is none (robosuite's own reader overflows with NumPy 2)."""
    import mujoco

    context = simulation.env.sim._render_context_offscreen
    context.render(SIZE, SIZE, camera_id=simulation.model.camera(camera).id, segmentation=True)
    pixels = np.empty((SIZE, SIZE, 3), np.uint8)
    mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, SIZE, SIZE), context.con)
    drawn = pixels.astype(int) @ [1, 1 << 8, 1 << 16] - 1
    geoms = {g.segid: g.objid for g in context.scn.geoms[: context.scn.ngeom] if g.objtype == mujoco.mjtObj.mjOBJ_GEOM}
    return np.rot90(np.vectorize(lambda segment: geoms.get(segment, -1))(drawn), 2)


@pytest.mark.parametrize("view", [0, 1])
def test_cameras_project_meshes_onto_their_pixels(simulation, view):
    """Bounding boxes of rendered segmentation masks agree with those of projected vertices, mirror and all."""
    import mujoco

    simulation.begin(EpisodeSpec(TASK, 0))
    camera, model, data = simulation.camera(simulation.cameras), simulation.model, simulation.data
    pose, matrix = camera.pose[view].astype(np.float64), camera.intrinsics[view].astype(np.float64)
    mask = segmentation(simulation, simulation.cameras[view])
    errors = []
    for geom in set(mask.ravel()) - {-1}:
        rows, columns = np.nonzero(mask == geom)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH or box.min() == 0 or box.max() == SIZE:
            continue
        first, count = (leaf[model.geom_dataid[geom]] for leaf in (model.mesh_vertadr, model.mesh_vertnum))
        vertices = model.mesh_vert[first : first + count]
        points = vertices @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        projected = (points - pose[:3, 3]) @ pose[:3, :3] @ matrix.T
        pixels = projected[:, :2] / projected[:, 2:]
        errors.append(np.abs(np.concatenate([pixels.min(axis=0), pixels.max(axis=0)]) - box).max())
    assert len(errors) >= 3
    assert np.sort(errors)[2] < 1.5, errors  # at least three meshes, each whole and unoccluded
    assert np.median(errors) < 4.0, errors
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0, abs=1e-5)
    assert matrix[0, 0] < 0 < matrix[1, 1]


def test_wrist_camera_sees_the_grip_site_where_it_projects_to(simulation):
    """The point between the fingers lies on the middle column of the wrist view, in front of the camera."""
    simulation.begin(EpisodeSpec(TASK, 0, "test", "official"))
    camera = simulation.camera(simulation.cameras)
    point = simulation.proprio()[:3].astype(np.float64)
    for view, near in ((0, 1.5), (1, 0.3)):
        pose = camera.pose[view].astype(np.float64)
        x, y, depth = camera.intrinsics[view] @ (pose[:3, :3].T @ (point - pose[:3, 3]))
        assert 0 < depth < near
        assert 0 < x / depth < SIZE and 0 < y / depth < SIZE
        assert abs(x / depth - SIZE / 2) < 0.1 * SIZE


def test_proprioception_is_what_robosuite_observes(simulation):
    from robosuite.utils.transform_utils import quat2axisangle

    simulation.begin(EpisodeSpec(TASK, 1, "train", "shifted"))
    observed = simulation.env._get_observations(force_update=True)
    expected = np.concatenate(
        [
            observed["robot0_eef_pos"],
            quat2axisangle(observed["robot0_eef_quat"].copy()),
            observed["robot0_gripper_qpos"],
        ]
    )
    np.testing.assert_allclose(simulation.proprio(), expected, atol=1e-6)


def test_imagined_proprioception_has_robosuites_angles(environment):
    """A hand that points down turns by about pi: a vector that jumps to the other side there is news to the policy."""
    slots = list(range(environment.num_slots))
    angles = []
    for seed, actions in enumerate(0.3 * random_actions(4, len(slots), 8)):
        frames = environment.reset(slots, [EpisodeSpec(0, seed, "train", "shifted", sample=slot) for slot in slots])
        start = frames.proprio[:, 0]
        predicted = advance_proprio(Kinematics.osc_pose(), start, start, actions).proprio
        observed = environment.step(slots, actions, every_frame=True).proprio
        np.testing.assert_allclose(predicted[..., 3:6], observed[..., 3:6], atol=1.0)  # a jump is 6
        angles.append(np.linalg.norm(observed[..., 3:6], axis=-1))
    assert (np.array(angles) > np.pi).any() and (np.array(angles) < np.pi).any()


def test_a_killed_worker_changes_nothing(environment):
    specs = [EpisodeSpec(0, 0, "train", "shifted"), EpisodeSpec(0, 3, "test", "official")]
    chunks = random_actions(3, 2, 8)

    def run(kill_before: int | None) -> list[np.ndarray]:
        frames = [environment.reset([0, 1], specs)]
        for index, chunk in enumerate(chunks):
            if index == kill_before:
                os.kill(environment._pool.process_ids()[1], signal.SIGKILL)
            frames.append(environment.step([0, 1], chunk, every_frame=False))
        return [leaf for frame in frames for leaf in (frame.images, frame.proprio, frame.success)]

    expected, restarts = run(None), environment.restarts
    for got, want in zip(run(2), expected):
        np.testing.assert_array_equal(got, want)
    assert environment.restarts == restarts + 1


def test_a_slot_begins_while_another_steps(environment):
    other_scene, actions = EpisodeSpec(2, 0), random_actions(1, 8)
    alone = [environment.reset([1], [other_scene]), environment.reset([0], [EpisodeSpec(0, 0)])]
    alone.append(environment.step([0], actions, every_frame=False))
    environment.reset([0, 1], [EpisodeSpec(0, 0), EpisodeSpec(0, 0)])
    environment.begin([1], [other_scene])
    stepped = environment.step([0], actions, every_frame=False)
    begun = environment.begun(wait=True)
    assert begun.keys() == {1} and not environment.begun(wait=False)
    for got, want in ((begun[1].images, alone[0].images[0]), (stepped.images, alone[2].images)):
        np.testing.assert_array_equal(got, want)
    environment.begin([1], [EpisodeSpec(0, 0)])  # given up by what comes next
    assert next(environment.expert_episodes([EpisodeSpec(0, 1)], 0.0, draw=False)).images.shape[1] == 0


def test_demonstrations_succeed_and_replay_to_the_bit(environment):
    specs = [EpisodeSpec(0, 1), EpisodeSpec(0, 0, "test", "official")]
    demonstrations = list(environment.expert_episodes(specs, noise=0.05))
    for demonstration, spec in zip(demonstrations, specs):
        validate_episode(demonstration)
        assert demonstration.succeeded and demonstration.first_success == demonstration.num_steps
        environment.reset([0], [spec])
        frames = environment.step([0], demonstration.actions[None], every_frame=True)
        np.testing.assert_array_equal(frames.images[0], demonstration.images[1:])
        np.testing.assert_array_equal(frames.success[0], demonstration.success[1:])
    again = list(environment.expert_episodes(specs, noise=0.05))
    assert all(map(episodes_equal, demonstrations, again))


def test_bad_actions_and_specs_are_refused(environment):
    environment.reset([0], [EpisodeSpec(0, 0)])
    actions = np.zeros((1, 8, 7), np.float32)
    actions[0, 3, 2] = np.nan
    with pytest.raises(ValueError, match="slot 0, action 3"):
        environment.step([0], actions, every_frame=False)
    with pytest.raises(ValueError, match=r"\(1, 8, 6\), expected \(1, K, 7\)"):
        environment.step([0], np.zeros((1, 8, 6)), every_frame=False)
    with pytest.raises(ValueError, match="task: got 10"):
        environment.reset([0], [EpisodeSpec(10, 0)])
    with pytest.raises(ValueError, match="unknown views"):
        LiberoEnvironment(SUITE, views=("frontview",))


class WorldWithACrashingTask(LiberoEnvironment):
    """Task 1 asks its worker for something that raises, at the second chunk."""

    def begin(self, slots, specs):
        self.tasks = getattr(self, "tasks", {}) | {slot: spec.task for slot, spec in zip(slots, specs)}
        super().begin(slots, specs)

    def step(self, slots, actions, every_frame):
        call = self._pool.call
        crash = lambda requests: call({s: ("none",) if self.tasks[s] == 1 else r for s, r in requests.items()})
        self._pool.call = crash
        try:
            return super().step(slots, actions, every_frame)
        finally:
            self._pool.call = call


def test_a_crashing_task_is_an_error_and_the_others_go_on(installed):
    environment = WorldWithACrashingTask(SUITE, SIZE, ("agentview",), num_slots=2)
    try:
        environment.max_steps = 16
        outcomes = dict(run_episodes(environment, wander, [EpisodeSpec(task, 0) for task in (0, 1, 0)]))
        assert "AttributeError" in outcomes[1].error and outcomes[1].success is None
        assert [outcomes[i].success for i in (0, 2)] == [False, False]
        with pytest.raises(EpisodeError, match="AttributeError"):
            environment.reset([0, 1], [EpisodeSpec(0, 0), EpisodeSpec(1, 0)])
            environment.step([0, 1], random_actions(2, 8), every_frame=False)
    finally:
        environment.close()


def wander(images, proprio, specs, chunks):
    """Actions that depend on the episode, its chunk and what is seen, as a policy's do."""
    seeds = [[spec.task, spec.seed, chunk, int(image.sum())] for spec, chunk, image in zip(specs, chunks, images)]
    return np.stack([np.random.default_rng(seed).uniform(-1, 1, (8, 7)) for seed in seeds]).astype(np.float32)


def test_episodes_are_the_same_on_1_and_4_workers_and_where_one_is_killed(installed):
    specs = [EpisodeSpec(task, seed, "test", "shifted") for seed in range(2) for task in range(2)]

    def run(workers: int, kill_at: int | None = None) -> list:
        environment = LiberoEnvironment(SUITE, SIZE, ("agentview",), workers)
        calls = 0

        def act(*arguments):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(environment._pool.process_ids()[0], signal.SIGKILL)
            return wander(*arguments)

        try:
            environment.max_steps = 24
            outcomes = dict(run_episodes(environment, act, specs, record=True))
            assert environment.restarts == (kill_at is not None)
            return [outcomes[i] for i in range(len(specs))]
        finally:
            environment.close()

    expected = run(4)
    for outcomes in (run(4), run(1, kill_at=2)):
        for got, want in zip(outcomes, expected):
            assert (got.success, got.steps, got.error) == (want.success, want.steps, None)
            assert episodes_equal(got.episode, want.episode)
