# SPDX-License-Identifier: Apache-2.0
"""What every stage trains: the state, its optimiser, and one guarded gradient step.

Frozen parameters take no gradient, no optimiser state and no moving average: those trees have None in their place.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from worldenv_jax.errors import WorldEnvError
from worldenv_jax.types import Array, Params

Metrics = dict[str, Array]
# (params, key, batch) -> (scalar loss, scalar metrics)
LossFn = Callable[[Params, Array, Any], tuple[Array, Metrics]]


class TrainingDiverged(WorldEnvError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, per-group learning rates and a choice of what is trained.

    Patterns are regular expressions searched in a parameter's path, `params/llama/attention/q/kernel`.
    """

    learning_rate: float = 1e-4
    group_learning_rates: tuple[tuple[str, float], ...] = ()  # (pattern, rate); the first match wins
    trainable: tuple[str, ...] = ("",)  # patterns of the parameters that are trained; "" matches all
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0  # from 0 to the full rate, linear
    decay_steps: int = 0  # of the cosine, warm-up included
    final_fraction: float = 0.0  # of the rate, at the end of the cosine
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # decoupled; on matrices only, not on vectors and scalars
    clip_norm: float | None = 1.0  # of the global gradient
    micro_batches: int = 1  # gradient accumulation: the batch is cut into this many parts
    ema_decay: float | None = None  # None keeps no moving average

    def __post_init__(self):
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"a cosine schedule needs decay_steps > warmup_steps, got {self.decay_steps} and {self.warmup_steps}"
            )


class TrainState(NamedTuple):
    """Everything a training stage carries from step to step."""

    step: Array  # int32 [], steps done, skipped ones included
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of the trained parameters (None at frozen ones), or None
    key: Array  # PRNG key of the run; step n uses fold_in(key, n)
    skipped: Array  # int32 [], steps skipped for a non-finite loss or gradient, in all
    skipped_in_a_row: Array  # int32 []


def parameter_name(path: tuple) -> str:
    """`params/dense/kernel` for a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def trainable_mask(params: Params, patterns: tuple[str, ...]) -> Any:
    """A tree of Python bools: True where a pattern is found in the parameter's name.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    names = [parameter_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    unused = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if unused:
        raise ValueError(f"patterns {unused} match none of the {len(names)} parameters, for example {names[:3]}")
    matches = [any(re.search(pattern, name) for pattern in patterns) for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), matches)


def partition(params: Params, mask: Any) -> tuple[Params, Params]:
    """Splits into (trained, frozen), each with None in place of the other's leaves."""
    trained = jax.tree.map(lambda leaf, chosen: leaf if chosen else None, params, mask)
    frozen = jax.tree.map(lambda leaf, chosen: None if chosen else leaf, params, mask)
    return trained, frozen


def combine(trained: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm -> Adam -> decoupled weight decay -> learning rate of the schedule and the group."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    is_matrix = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(_schedule(config)),
        optax.stateless(lambda updates, _: _scale_groups(updates, config)),
    )


def _schedule(config: OptimizerConfig) -> optax.Schedule:
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0 if config.warmup_steps else 1.0,
            peak_value=1.0,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_steps,
            end_value=config.final_fraction,
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return optax.constant_schedule(1.0)


def _scale_groups(updates: Params, config: OptimizerConfig) -> Params:
    groups = (*config.group_learning_rates, ("", config.learning_rate))

    def scale(path, update):
        rate = next(rate for pattern, rate in groups if re.search(pattern, parameter_name(path)))
        return update * jnp.asarray(rate, update.dtype)

    return jax.tree_util.tree_map_with_path(scale, updates)


def init_train_state(params: Params, config: OptimizerConfig, key: Array) -> TrainState:
    """The state before the first step.

    Raises:
        ValueError: a pattern of `config` that matches no parameter.
    """
    trainable_mask(params, tuple(pattern for pattern, _ in config.group_learning_rates))
    trained, _ = partition(params, trainable_mask(params, config.trainable))
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, trained)
    zero = lambda: jnp.zeros((), jnp.int32)  # three buffers: a donated state must not hold one buffer twice
    return TrainState(zero(), params, make_optimizer(config).init(trained), ema, key, zero(), zero())


def ema_params(state: TrainState) -> Params:
    """The parameters to evaluate with: the moving averages where there are any."""
    return state.params if state.ema is None else combine(state.ema, state.params)


def value_and_grad(loss_fn: LossFn, config: OptimizerConfig, params: Params, key: Array, batch: Any):
    """Loss, metrics and gradients of the trained parameters, accumulated over `config.micro_batches`.

    The batch's leading axis is cut into equal parts, each with its own key; results are averaged over the parts.

    Returns:
        (loss [], metrics, gradients with None at frozen parameters).
    """
    trained, frozen = partition(params, trainable_mask(params, config.trainable))
    function = jax.value_and_grad(lambda t, k, b: loss_fn(combine(t, frozen), k, b), has_aux=True)
    parts = config.micro_batches
    if parts == 1:
        (loss, metrics), gradients = function(trained, key, batch)
        return loss, metrics, gradients
    # Part p takes rows p, p + parts, ...: every device of a split batch then holds rows of every part.
    batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, trained, key, first))

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, function(trained, *part)), None

    total, _ = jax.lax.scan(accumulate, zeros, (jax.random.split(key, parts), batch))
    (loss, metrics), gradients = jax.tree.map(lambda x: x / parts, total)
    return loss, metrics, gradients


def apply_gradients(
    state: TrainState, gradients: Params, config: OptimizerConfig, *, loss: Array
) -> tuple[TrainState, Metrics]:
    """One optimiser step; with a non-finite loss or gradient only the counters move.

    Args:
        state: the state before the step.
        gradients: as from `value_and_grad`, or of all parameters (those of frozen ones are dropped).
        config: the config that the state was made with.
        loss: [], only looked at for being finite.

    Returns:
        The new state, and `gradient_norm`, `update_norm`, `parameter_norm` (global, of the trained parameters),
        `skipped` (in all) and `skipped_in_a_row`.
    """
    trained, frozen = partition(state.params, trainable_mask(state.params, config.trainable))
    gradients = jax.tree.map(lambda t, g: None if t is None else g, trained, gradients, is_leaf=_is_none)
    gradient_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, trained)
    new = optax.apply_updates(trained, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda average, x: average + (1 - config.ema_decay) * (x - average), ema, new)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    skip = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=combine(keep(new, trained), frozen),
        opt_state=keep(opt_state, state.opt_state),
        ema=keep(ema, state.ema),
        key=state.key,
        skipped=state.skipped + skip,
        skipped_in_a_row=(state.skipped_in_a_row + skip) * skip,
    )
    metrics = {
        "gradient_norm": gradient_norm,
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(new),
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    return state, metrics


def make_train_step(
    loss_fn: LossFn, config: OptimizerConfig, state_shardings: Any = None
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted supervised step: `(state, batch) -> (state, metrics)`; the old state's buffers are donated.

    Args:
        loss_fn: see `LossFn`.
        config: the config that the state was made with.
        state_shardings: `mesh.shardings(state, mesh)` on a mesh; without them the compiler may lay the new state out
            in another way than the old one.
    """

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, metrics, gradients = value_and_grad(loss_fn, config, state.params, key, batch)
        state, norms = apply_gradients(state, gradients, config, loss=loss)
        return state, {"loss": loss, **metrics, **norms}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))


def check_not_diverged(metrics: Mapping[str, float], limit: int) -> None:
    """Stops a run whose steps are skipped again and again.

    Raises:
        TrainingDiverged: `skipped_in_a_row` has reached `limit`.
    """
    skipped = int(metrics.get("skipped_in_a_row", 0))
    if skipped >= limit:
        raise TrainingDiverged(
            f"loss or gradients were not finite in {skipped} steps in a row: training has diverged. Lower the "
            "learning rate or look at the batches of these steps; the last checkpoint is from before them."
        )
