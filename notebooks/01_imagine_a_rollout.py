# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Imagine a rollout
#
# The smallest preset, untrained: every part is the real class with other numbers. Policy, simulator and judge are pure
# functions; `imagine_rollout` runs them in one compiled scan.

# %%
import jax
import numpy as np

from worldenv_jax import RolloutParams, imagine_rollout, leave_one_out_advantages
from worldenv_jax.configs import get_config
from worldenv_jax.envs import make_environment
from worldenv_jax.evaluation.strips import Strip, draw_strip, merge_views
from worldenv_jax.policy import init_policy
from worldenv_jax.reflector import init_reflector
from worldenv_jax.simulator import Kinematics, init_simulator
from worldenv_jax.training.models import Models
from worldenv_jax.types import EpisodeSpec, Statistics

config = get_config("debug")

# %% [markdown]
# Two first frames from the embedded tabletop. Only a start is taken from the true world, no step.

# %%
environment = make_environment(config.environment)
episodes = list(environment.expert_episodes([EpisodeSpec(0, 0), EpisodeSpec(1, 1)], noise=0.0))
[episode.instruction for episode in episodes]

# %%
ones = np.ones(7, np.float32)
statistics = Statistics(-ones, ones, np.full(8, -4, np.float32), np.full(8, 4, np.float32))
models = Models.make(config, statistics, Kinematics.osc_pose(), environment.instructions)
keys = jax.random.split(jax.random.key(0), 4)
params = RolloutParams(
    init_policy(config.policy, keys[0]),
    init_simulator(config.simulator, keys[1]),
    init_reflector(config.reflector, keys[2]),
)

# %% [markdown]
# S starts x G samples. The first call compiles; `rollout` holds everything that the loss needs.

# %%
imagine = jax.jit(
    lambda params, key, starts: imagine_rollout(
        models.policy(), models.simulator, models.reflector, params, key, starts, config.rollout
    )
)
rollout = imagine(params, keys[3], models.starts(episodes))
jax.tree.map(lambda leaf: leaf.shape, rollout._asdict())

# %% [markdown]
# One reward per trajectory; the leave-one-out baseline is the mean of the others of its group.

# %%
rewards = rollout.reward.reshape(-1, config.rollout.samples)
rewards, leave_one_out_advantages(rewards)

# %% [markdown]
# An untrained simulator imagines noise. After `make quickstart` the same picture shows the task being done.

# %%
frames = np.asarray(rollout.frames[0]).reshape(-1, *rollout.frames.shape[3:])
strip = Strip(
    imagined=merge_views(np.concatenate([episodes[0].images[:1], frames])),
    probability=np.concatenate([[np.nan], np.asarray(rollout.success_probability[0]).reshape(-1)]),
)
from PIL import Image  # noqa: E402

Image.fromarray(draw_strip(strip))
