# SPDX-License-Identifier: Apache-2.0
"""The policy as pure functions: initialisation, the action distribution, and the `PolicyFn` of a rollout."""

import functools
import math

import jax
import jax.numpy as jnp

from worldenv_jax.data.image_transforms import center_crop, normalize, resize_lanczos
from worldenv_jax.networks.lora import init_lora, merge_lora, scale_lora
from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.policy.diffusion import add_noise, ddim_step
from worldenv_jax.policy.laplace import clip_log_scale, laplace_log_prob, sample_laplace
from worldenv_jax.policy.model import Inputs, Policy
from worldenv_jax.types import Array, Observation, Params, PolicyFn, PolicyStep, Statistics, Text

# The modules that PEFT's "all-linear" adapts; heads and projectors of proprioception and noise are trained in full.
ADAPTED = ("dino", "siglip", "projector", "llama")


@functools.partial(jax.jit, static_argnums=0)
def init_policy(config: PolicyConfig, key: Array) -> Params:
    """Random parameters, float32: {"params": ...} and, with config.lora_rank > 0, {"lora": ...} beside it."""
    params_key, lora_key = jax.random.split(key)
    size = (1, config.views, config.image_size, config.image_size, 3)
    text = Text(jnp.zeros((1, config.text_length), jnp.int32), jnp.ones((1, config.text_length), bool))
    inputs = Inputs(jnp.zeros(size), jnp.zeros(size), jnp.zeros((1, config.proprio_dim)), text)
    params = {"params": Policy(config).init(params_key, inputs, method=_touch_all)["params"]}
    if config.lora_rank > 0:
        adapted = {name: params["params"][name] for name in ADAPTED}
        params["lora"] = init_lora(lora_key, adapted, config.lora_rank)
    return params


def policy_distribution(
    config: PolicyConfig, params: Params, statistics: Statistics, observation: Observation
) -> tuple[Array, Array]:
    """The Laplace distribution of the next chunk of normalised actions.

    Args:
        observation: images uint8 [B, V, H, W, 3] of any size, raw proprioception, the tokenised prompt.

    Returns: (loc, log_scale), float32 [B, K, A]; log_scale is within config.log_scale_range.

    Raises: ValueError where the observation does not fit the configuration, or the head is "diffusion".
    """
    if config.head != "l1":
        raise ValueError(f"the {config.head} head has no density: policy_distribution needs head='l1'")
    inputs = prepare_inputs(config, statistics, observation)
    loc, log_scale = apply_policy(config, params, inputs)
    return loc, clip_log_scale(log_scale, *config.log_scale_range)


def make_policy_fn(
    config: PolicyConfig, statistics: Statistics, scale_factor: float = 1.0, deterministic: bool = False
) -> PolicyFn:
    """The policy of a rollout.

    Args:
        scale_factor: multiplies the Laplace scale, for exploration.
        deterministic: the actions are `loc` instead of a sample.

    Returns: (params, key [B], observation) -> PolicyStep; row b samples from key b. With the diffusion head the
        actions are one DDIM sample and log_prob, log_scale are NaN: it has no density to train on.
    """

    def laplace(params: Params, key: Array, observation: Observation) -> PolicyStep:
        loc, log_scale = policy_distribution(config, params, statistics, observation)
        # Differs from RIPT-VLA: one distribution, clipped and scaled, is sampled from, scored and handed on.
        log_scale = log_scale + math.log(scale_factor)
        actions = loc if deterministic else sample_laplace(key, loc, log_scale)
        return PolicyStep(actions, laplace_log_prob(actions, loc, log_scale).sum(-1), loc, log_scale)

    def diffusion(params: Params, key: Array, observation: Observation) -> PolicyStep:
        noise = jax.vmap(lambda k: jax.random.normal(k, (config.chunk, config.action_dim)))(key)
        actions = diffusion_actions(config, params, statistics, observation, noise)
        unknown = jnp.full_like(actions, jnp.nan)
        return PolicyStep(actions, unknown.sum(-1), actions, unknown)

    return laplace if config.head == "l1" else diffusion


def diffusion_actions(
    config: PolicyConfig, params: Params, statistics: Statistics, observation: Observation, noise: Array
) -> Array:
    """Normalised actions [B, K, A] by DDIM from `noise` [B, K, A]; the images are encoded once."""
    return ddim_trajectory(config, params, prepare_inputs(config, statistics, observation), noise)[1][-1]


def diffusion_loss(
    config: PolicyConfig, params: Params, statistics: Statistics, key: Array, observation: Observation, actions: Array
) -> Array:
    """Mean squared error of the predicted noise at one random timestep per row; actions normalised [B, K, A]."""
    time_key, noise_key = jax.random.split(key)
    timestep = jax.random.randint(time_key, actions.shape[:1], 0, config.diffusion_steps)
    noise = jax.random.normal(noise_key, actions.shape)
    noisy = add_noise(actions, noise, timestep, config.diffusion_steps)
    inputs = prepare_inputs(config, statistics, observation)
    context = apply_policy(config, params, inputs, method=Policy.encode)
    predicted = apply_policy(config, params, context, noisy, timestep, method=Policy.denoise)
    return jnp.mean((predicted - noise) ** 2)


def ddim_trajectory(config: PolicyConfig, params: Params, inputs: Inputs, noise: Array) -> tuple[Array, Array]:
    """All DDIM steps: (predicted noise, x after the step), float32 [steps, B, K, A] each."""
    context = apply_policy(config, params, inputs, method=Policy.encode)

    def step(x: Array, timestep: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = jnp.full(len(x), timestep)
        epsilon = apply_policy(config, params, context, x, rows, method=Policy.denoise)
        x = ddim_step(x, epsilon, timestep, config.diffusion_steps)
        return x, (epsilon, x)

    return jax.lax.scan(step, noise, jnp.arange(config.diffusion_steps)[::-1])[1]


def prepare_inputs(config: PolicyConfig, statistics: Statistics, observation: Observation) -> Inputs:
    """Normalises an observation.

    Images of another size than the towers' are resized (Lanczos-3) and, with config.center_crop, cropped; images of
    the right size are taken to be ready.

    Raises: ValueError listing everything that does not fit the configuration.
    """
    images, text = observation.images, observation.text
    expected = {
        "views": (images.shape[1], config.views),
        "proprioception": (observation.proprio.shape[-1], config.proprio_dim),
        "prompt tokens": (text.tokens.shape[-1], config.text_length),
    }
    wrong = [f"{name}: got {got}, expected {want}" for name, (got, want) in expected.items() if got != want]
    if wrong:
        raise ValueError("the observation does not fit the policy config: " + "; ".join(wrong))
    if images.shape[-3:-1] != (config.image_size, config.image_size):
        images = resize_lanczos(images, config.image_size)
        images = center_crop(images) if config.center_crop else images
    return Inputs(
        normalize(images, config.dino_mean, config.dino_std),
        normalize(images, config.siglip_mean, config.siglip_std),
        statistics.normalize_proprio(observation.proprio),
        text,
    )


def apply_policy(config: PolicyConfig, params: Params, *args, method=Policy.__call__):
    """A method of the model, with the adapters where `params` has them; see `Policy`."""
    variables = {"params": params["params"]}
    if "lora" in params:
        variables["lora"] = scale_lora(params["lora"], config.lora_scale)
    return Policy(config).apply(variables, *args, method=method)


def merge_adapters(config: PolicyConfig, params: Params) -> Params:
    """The same policy with its adapters added to the kernels (for a config with lora_rank=0)."""
    merged = {**params, "params": merge_lora(params["params"], params["lora"], config.lora_scale)}
    del merged["lora"]
    return merged


def _touch_all(model: Policy, inputs: Inputs) -> None:
    """Runs every module once, so that `init` creates all parameters."""
    if model.config.head == "l1":
        model(inputs)
    else:
        shape = (len(inputs.proprio), model.config.chunk, model.config.action_dim)
        model.denoise(model.encode(inputs), jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32))
