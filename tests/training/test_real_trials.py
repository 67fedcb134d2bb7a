# SPDX-License-Identifier: Apache-2.0
"""Post-training on episodes of a true world, with the tabletop's environment in LIBERO's place."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from worldenv_jax.configs import get_config
from worldenv_jax.critic import CriticConfig
from worldenv_jax.envs import make_environment
from worldenv_jax.envs.base import EpisodeError
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.metrics import read_json_lines
from worldenv_jax.policy import init_policy, policy_distribution
from worldenv_jax.simulator import Kinematics
from worldenv_jax.training import pipeline
from worldenv_jax.training.acting import compile_policy
from worldenv_jax.training.imagination import replay_in_environment
from worldenv_jax.training.models import Models
from worldenv_jax.training.real_trials import real_trials, run_trials
from worldenv_jax.types import EpisodeSpec, Observation, Statistics

CONFIG = get_config("debug")
SPECS = [EpisodeSpec(task, 700, "train", "shifted", sample) for task in (0, 1) for sample in range(3)]


@pytest.fixture(scope="module")
def environment():
    return make_environment(CONFIG.environment)


@pytest.fixture(scope="module")
def models(environment):
    one = lambda size: np.ones(size, np.float32)
    statistics = Statistics(-one(7), one(7), -one(8), one(8))
    return Models.make(CONFIG, statistics, Kinematics.osc_pose(), environment.instructions)


@pytest.fixture(scope="module")
def rollout(environment, models):
    policy = compile_policy(models.policy(0.7), models.statistics, models.policy_prompts)
    params = init_policy(CONFIG.policy, jax.random.key(0))
    return params, run_trials(CONFIG, models, environment, policy, params, jax.random.key(1), SPECS)


def test_what_is_learned_from_is_what_was_done(environment, models, rollout):
    params, result = rollout
    assert result.actions.shape == (6, 2, 4, 7) and result.observations.images.shape == (6, 2, 1, 32, 32, 3)
    assert result.frames.size == 0
    density = -np.abs(result.actions - result.loc) / np.exp(result.log_scale) - result.log_scale - np.log(2)
    np.testing.assert_allclose(result.log_prob, density.sum(-1), atol=1e-4)
    for chunk in range(2):
        images, proprio = (leaf[:, chunk] for leaf in result.observations[:2])
        observation = Observation(images, proprio, result.observations.text)
        loc, log_scale = policy_distribution(CONFIG.policy, params, models.statistics, observation)
        np.testing.assert_allclose(result.loc[:, chunk], loc, atol=1e-4)
        np.testing.assert_allclose(result.log_scale[:, chunk], log_scale + np.log(0.7), atol=1e-4)
    actions = np.asarray(models.statistics.unnormalize_action(result.actions))
    _, success = replay_in_environment(environment, SPECS, actions)
    np.testing.assert_array_equal(result.reward, success.any(1))
    np.testing.assert_array_equal(result.length, np.where(success.any(1), success.argmax(1) + 1, 8))
    np.testing.assert_array_equal(result.valid.reshape(6, -1).sum(1), result.length)


def test_a_group_starts_alike_and_acts_differently(rollout):
    images, actions = rollout[1].observations.images[:, 0], rollout[1].actions[:, 0]
    for first in (0, 3):
        assert (images[first : first + 3] == images[first]).all()
        assert all(not np.array_equal(actions[first], actions[first + other]) for other in (1, 2))
    assert not np.array_equal(images[0], images[3])


class Failing:
    """An environment in which the first `failures` steps of a slot's episode go wrong."""

    def __init__(self, environment, failures):
        self.environment, self.failures = environment, failures

    def __getattr__(self, name):
        return getattr(self.environment, name)

    def step(self, slots, actions, every_frame):
        frames = self.environment.step(slots, actions, every_frame)
        if self.failures:
            self.failures -= 1
            rest = {slot: jax.tree.map(lambda leaf, r=row: leaf[r], frames) for row, slot in enumerate(slots)}
            raise EpisodeError({slots[0]: "lost"}, {slot: rest[slot] for slot in slots[1:]})
        return frames


def test_an_episode_whose_world_failed_is_run_again(environment, models, rollout):
    policy = compile_policy(models.policy(0.7), models.statistics, models.policy_prompts)
    arguments = (policy, rollout[0], jax.random.key(1), SPECS)
    again = run_trials(CONFIG, models, Failing(environment, 1), *arguments)
    jax.tree.map(np.testing.assert_array_equal, again, rollout[1])
    with pytest.raises(WorldEnvError, match="failed 3 times; the last: lost"):
        run_trials(CONFIG, models, Failing(environment, 10**6), *arguments)


def test_a_stage_runs_and_resumes_to_the_bit(tmp_path, monkeypatch):
    """Through the pipeline, the tabletop under another name, with a critic: four iterations, or two and two more."""
    critic, results = CriticConfig(updates=2, warmup=1), []
    for name, stops in (("straight", (4,)), ("resumed", (2, 4))):
        for iterations in stops:
            config = replace(CONFIG, post_training=replace(CONFIG.post_training, iterations=iterations, critic=critic))
            run = pipeline.Run(config, tmp_path / name)
            if iterations == stops[0]:
                run.workdir.save_config()
                pipeline.collect_demonstrations(run)
                run.workdir.save_params("policy", init_policy(config.policy, jax.random.key(0)))
                pipeline.collect_exploration(run)
            monkeypatch.setattr(run.environment, "name", "another")
            world = replace(config.environment, name="another")
            run.config = replace(config, environment=world)
            pipeline.post_train_true(run)
        results.append(run.params("post_trained_true"))
        rows = read_json_lines(tmp_path / name / "metrics" / "post_train_true.jsonl")
        assert [row["step"] for row in rows if "critic_loss" in row] == [1, 2, 3, 4]
        assert [row["step"] for row in rows if "updates" in row] == [2, 3, 4]  # first the critic alone learns
    jax.tree.map(np.testing.assert_array_equal, *results)


class Generous:
    """An environment in which every command of task 1 succeeds."""

    def __init__(self, environment):
        self.environment, self.tasks = environment, {}

    def __getattr__(self, name):
        return getattr(self.environment, name)

    def begin(self, slots, specs):
        self.tasks |= {slot: spec.task for slot, spec in zip(slots, specs)}
        self.environment.begin(slots, specs)

    def step(self, slots, actions, every_frame):
        frames = self.environment.step(slots, actions, every_frame)
        given = np.array([self.tasks[slot] == 1 for slot in slots])
        return frames._replace(success=frames.success | given[:, None])


class Counting(Generous):
    """... and which remembers every episode."""

    played = ()

    def begin(self, slots, specs):
        self.played = [*self.played, *specs]
        super().begin(slots, specs)


def test_the_estimate_is_the_success_rate(environment, models):
    """An untrained policy fails where nothing is given."""
    specs = [EpisodeSpec(task, seed) for task, seed in ((0, 800), (1, 801), (1, 802), (0, 803), (0, 804))]
    held_out = list(environment.expert_episodes(specs, 0.0))
    trials = real_trials(CONFIG, models, Generous(environment), held_out, held_out)
    figures = trials.estimate(init_policy(CONFIG.policy, jax.random.key(0)))
    assert figures == {"held_out_reward": 0.4, "held_out_terminated": 0.4}


def test_the_estimate_of_samples_runs_every_start_so_often(environment, models):
    settings = replace(CONFIG.post_training, held_out_samples=3)
    held_out = list(environment.expert_episodes([EpisodeSpec(0, 800), EpisodeSpec(1, 801)], 0.0))
    counting = Counting(environment)
    trials = real_trials(replace(CONFIG, post_training=settings), models, counting, held_out, held_out)
    assert trials.estimate(init_policy(CONFIG.policy, jax.random.key(0)))["held_out_reward"] == 0.5
    expected = [EpisodeSpec(task, seed, sample=n) for task, seed in ((0, 800), (1, 801)) for n in range(3)]
    assert sorted(counting.played) == expected
