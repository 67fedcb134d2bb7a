# SPDX-License-Identifier: Apache-2.0
"""The true tabletop behind the border of the learned simulator, and a judge that reads the true predicate.

With these two in place of the learned models, `imagine_rollout` trains and replays in the real world: the upper bound
of post-training, and the truth against which imagined action sequences are checked.
"""

from worldenv_jax.envs.tabletop.chunk import run_chunk
from worldenv_jax.envs.tabletop.config import TabletopConfig
from worldenv_jax.types import ReflectorFns, SimulatorFns, Statistics


def tabletop_simulator_fns(statistics: Statistics, config: TabletopConfig | None = None) -> SimulatorFns:
    """The true world as `SimulatorFns`; its state is the `TabletopState` in `Starts.environment`.

    Parameters and keys are ignored: the world is deterministic. `Prediction.success` is the true predicate.

    Args:
        statistics: how the policy's normalised actions become environment actions.
        config: the world in which the starts were drawn.
    """
    config = config or TabletopConfig()

    def init(params, key, starts):
        del params, key
        return starts.environment

    def step(params, key, states, actions):
        del params, key
        return run_chunk(config, states, statistics.unnormalize_action(actions))

    return SimulatorFns(init, step)


def oracle_reflector_fns() -> ReflectorFns:
    """A judge whose probability is 1.0 where `Prediction.success` holds, else 0.0."""

    def judge(params, state, prediction):
        del params
        return state, prediction.success.astype("float32")

    return ReflectorFns(lambda params, starts: (), judge)
