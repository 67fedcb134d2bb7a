# SPDX-License-Identifier: Apache-2.0
"""Compares the simulator with EVAC's numbers; the fixture format is described in the fixture's README.

Videos in the fixture are (B v) c t h w; ours are [B, V, T, h, w, c].
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from tools.parity import Result, compare, load_npz, unknown
from worldenv_jax.networks.resampler import Resampler, ResamplerConfig
from worldenv_jax.networks.vision_transformer import VisionTransformer, ViTConfig
from worldenv_jax.simulator import losses
from worldenv_jax.simulator.action_maps import ActionMapConfig, ray_maps, scale_intrinsics
from worldenv_jax.simulator.autoencoder import Autoencoder, AutoencoderConfig
from worldenv_jax.simulator.conditioning import decode_latents, predict_v
from worldenv_jax.simulator.config import SimulatorConfig
from worldenv_jax.simulator.delta_actions import normalize_deltas
from worldenv_jax.simulator.evac_pictures import draw_pictures, drawn_poses, two_arm_deltas
from worldenv_jax.simulator.image_preprocess import clip_preprocess
from worldenv_jax.simulator.noise_schedule import (
    ScheduleConfig,
    as_float32,
    ddim_tables,
    guide,
    noise_schedule,
    schedule_buffers,
)
from worldenv_jax.simulator.pose_rollout import plan_poses, rollout_poses
from worldenv_jax.simulator.sampler import sample_chunk
from worldenv_jax.simulator.video_unet import VideoUNet, VideoUNetConfig
from worldenv_jax.types import Params
from worldenv_jax.weights.evac import evac_rows, flatten_checkpoint, load_evac
from worldenv_jax.weights.name_tables import export_tensors

IMAGE_TOKENS = 256


def check(fixture: Path) -> Iterator[Result]:
    """All quantities found in a fixture folder."""
    sizes = json.loads((fixture / "config.json").read_text())
    config = fixture_config(sizes)
    params, _ = load_evac(config, flatten_checkpoint(load_file(fixture / "weights.safetensors")))
    checks = {
        "unet": _check_unet,
        "action_resampler": functools.partial(_check_resampler, "action_resampler"),
        "image_resampler": functools.partial(_check_resampler, "image_resampler"),
        "clip": _check_clip,
        "vae": _check_vae,
        "schedule": _check_schedule,
        "loss": _check_loss,
        "teacher_forcing": _check_teacher_forcing,
        "actions_traj_rays": functools.partial(_check_actions, sizes["actions"]),
        "rollout": _check_rollout,
    }
    for path in sorted(fixture.glob("*.npz")):
        arrays = load_npz(path)
        if path.stem == "ddim_inputs":
            continue
        if path.stem.startswith("ddim_"):
            run = functools.partial(_check_ddim, load_npz(fixture / "ddim_inputs.npz"))
        elif path.stem in checks:
            run = checks[path.stem]
        else:
            yield unknown(path.stem)
            continue
        for result in run(config, params, arrays):
            yield result._replace(name=f"{path.stem}: {result.name}")


def fixture_config(sizes: dict) -> SimulatorConfig:
    """The simulator that `config.json` describes."""
    vae, unet, clip, diffusion = (sizes[key] for key in ("vae", "unet", "clip", "diffusion"))

    def resampler(name: str) -> ResamplerConfig:
        part = sizes[name]
        queries = part["num_queries"] * part.get("video_length", 1)
        return ResamplerConfig(
            queries, part["embedding_dim"], part["dim"], part["output_dim"], part["depth"], part["heads"],
            part["dim_head"], part["ff_mult"],
        )  # fmt: skip

    return SimulatorConfig(
        image_size=tuple(sizes["image_size"]),
        views=sizes["n_view"],
        history=sizes["n_previous"],
        chunk=sizes["chunk"],
        autoencoder=AutoencoderConfig(vae["ch"], tuple(vae["ch_mult"]), vae["num_res_blocks"]),
        latent_scale=diffusion["scale_factor"],
        unet=VideoUNetConfig(
            channels=unet["model_channels"],
            multipliers=tuple(unet["channel_mult"]),
            res_blocks=unet["num_res_blocks"],
            attention_levels=tuple(int(np.log2(r)) for r in unet["attention_resolutions"]),
            head_dim=unet["num_head_channels"],
            init_attention_heads=sizes["unet_fixed"]["addition_attention_heads"],
            context_width=unet["context_dim"],
            domains=sizes["unet_fixed"]["domain_embeddings"],
        ),
        image_encoder=_clip_config(clip, sizes["clip_fixed"]),
        image_resampler=resampler("image_resampler"),
        action_resampler=resampler("action_resampler"),
        schedule=ScheduleConfig(
            diffusion["timesteps"], diffusion["linear_start"], diffusion["linear_end"],
            diffusion["base_scale"], diffusion["turning_step"],
        ),
        action_map=ActionMapConfig(
            sizes["actions"]["gripper_offset_z"], sizes["actions"]["axis_length"], sizes["actions"]["circle_radius"],
            sizes["actions"]["line_thickness"], sizes["actions"]["background"],
        ),
        reference_quirks=True,
    )  # fmt: skip


def _clip_config(clip: dict, fixed: dict) -> ViTConfig:
    return ViTConfig(
        fixed["image_size"], fixed["patch_size"], clip["width"], clip["layers"], clip["heads"],
        int(clip["width"] * fixed["mlp_ratio"]), class_token=True, pre_norm=True, position_on_prefix=True,
        patch_bias=False, norm_eps=1e-5,
    )  # fmt: skip


def videos(array: np.ndarray, views: int) -> jax.Array:
    """(B v) c t h w to [B, V, T, h, w, c]."""
    array = np.moveaxis(array, 1, -1)
    return jnp.asarray(array.reshape(-1, views, *array.shape[1:]))


def foreign_videos(array: jax.Array) -> np.ndarray:
    """[B, V, T, h, w, c] to (B v) c t h w."""
    return np.moveaxis(np.asarray(array).reshape(-1, *array.shape[2:]), -1, 1)


def _context(config: SimulatorConfig, array: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Context (B v, 272, D) to image tokens of all views [B, V * 256, D] and action tokens of view 0 [B, 16, D]."""
    context = jnp.asarray(array).reshape(-1, config.views, *array.shape[1:])
    image = context[:, :, :IMAGE_TOKENS].reshape(len(context), -1, context.shape[-1])
    return image, context[:, 0, IMAGE_TOKENS:]


def _prepare(config: SimulatorConfig, params: Params, condition, context, rate, domain):
    image, action = _context(config, context)
    return VideoUNet(config.unet).apply(
        {"params": params["denoiser"]["unet"]},
        videos(condition, config.views), image, action, jnp.asarray(rate), jnp.asarray(domain), method="prepare",
    )  # fmt: skip


def _check_unet(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    channels = config.unet.latent_channels
    x, condition = arrays["in_x"][:, :channels], arrays["in_x"][:, channels:]

    @jax.jit
    def forward(params):
        prepared = _prepare(config, params, condition, arrays["in_context"], arrays["in_fs"], arrays["in_domain_id"])
        t = jnp.asarray(arrays["in_t"]).reshape(-1, config.views)
        return predict_v(config, params, videos(x, config.views), t, prepared)

    yield compare("v", foreign_videos(forward(params)), arrays["out"], 5e-5)


def _check_resampler(name: str, config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    model = Resampler(getattr(config, name))
    for suffix in ("", "_long"):
        if f"in_x{suffix}" in arrays:
            out = model.apply({"params": params["denoiser"][name]}, arrays[f"in_x{suffix}"])
            yield compare(f"tokens{suffix}", out, arrays[f"out{suffix}"], 2e-5)


def _check_clip(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    tower = VisionTransformer(config.image_encoder)
    for name in (name for name in arrays if name.startswith("in_image")):
        suffix = name[len("in_image") :]
        pixels = clip_preprocess(
            jnp.asarray(arrays[name], jnp.float32).transpose(0, 2, 3, 1), config.image_encoder.image_size
        )
        reference = arrays[f"out_preprocessed{suffix}"]
        first = np.moveaxis(np.asarray(pixels), -1, 1)[: len(reference)]
        yield compare(f"preprocessed{suffix}", first, reference, 1e-4)
        tokens = tower.apply({"params": params["image_encoder"]}, pixels)
        yield compare(f"tokens{suffix}", tokens, arrays[f"out_tokens{suffix}"], 1e-4)


def _check_vae(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    model, variables = Autoencoder(config.autoencoder), {"params": params["autoencoder"]}
    nchw = lambda x: np.moveaxis(np.asarray(x), -1, 1)
    nhwc = lambda x: jnp.moveaxis(jnp.asarray(x), 1, -1)
    mean, log_variance = model.apply(variables, nhwc(arrays["in_image"]), method="encode")
    reference = arrays["out_moments"].copy()
    reference[:, mean.shape[-1] :] = np.clip(reference[:, mean.shape[-1] :], -30.0, 20.0)
    yield compare("moments", nchw(jnp.concatenate([mean, log_variance], axis=-1)), reference, 5e-5)
    yield compare("mean", nchw(mean), arrays["out_mean"], 5e-5)
    yield compare("log-variance", nchw(log_variance), arrays["out_logvar"], 5e-5)
    sample = mean + jnp.exp(0.5 * log_variance) * nhwc(arrays["in_noise"])
    yield compare("sample", nchw(sample), arrays["out_sample"], 5e-5)
    decode = lambda z: nchw(model.apply(variables, nhwc(z), method="decode"))
    yield compare("decode", decode(arrays["in_z"]), arrays["out_decode"], 5e-5)
    scaled = arrays["in_latent_scaled"] / config.latent_scale
    yield compare("decode from scaled", decode(scaled), arrays["out_decode_from_scaled"], 5e-5)


def _check_schedule(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    del params
    buffers = schedule_buffers(noise_schedule(config.schedule))
    for name, reference in arrays.items():
        if name.startswith("ddim"):
            count, _, field = name[len("ddim") :].partition("_")
            eta = float(field[len("sigmas_eta") :]) if field.startswith("sigmas") else 0.0
            tables = ddim_tables(config.schedule, int(count), eta)
            fields = {
                "timesteps": tables.t, "alphas": tables.alpha, "alphas_prev": tables.alpha_next,
                "scale": tables.scale, "scale_prev": tables.scale_next,
            }  # fmt: skip
            yield compare(name, np.flip(fields.get(field, tables.sigma)), reference, 1e-6)
        elif name in buffers:
            yield compare(name, buffers[name].astype(np.float32), reference, 1e-6)
        else:
            yield unknown(name)


def _check_ddim(inputs: dict, config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    guidance, rescale = float(arrays["in_cfg_scale"]), float(arrays["in_guidance_rescale"])
    out = sample_reference(
        config, params, inputs["in_c_concat"], inputs["in_context"], inputs.get("in_uncond_context"),
        inputs["in_start_noise"], arrays["in_step_noise"], inputs["in_fs"], inputs["in_domain_id"],
        float(arrays["in_eta"]), guidance, rescale,
    )  # fmt: skip
    tolerance = 5e-5 if guidance == 1.0 else 3e-4
    steps = np.flip(ddim_tables(config.schedule, len(arrays["in_step_noise"]), 0.0).t)
    yield compare("timesteps", steps, arrays["in_timesteps"], 0)
    for name, ours in zip(("out", "out_x", "out_pred_x0"), out):
        yield compare(name, ours, arrays[name], tolerance)


def sample_reference(
    config: SimulatorConfig, params: Params, condition, context, blank_context, start_noise, step_noise, rate, domain,
    eta: float, guidance: float, rescale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """One chunk in the fixture's layout: final latents, latents before each step, predicted x0 of each step."""
    channels = config.unet.latent_channels
    tables = as_float32(ddim_tables(config.schedule, len(step_noise), eta))
    bare = condition.copy()
    bare[:, : channels + 1, config.history :] = 0.0

    @jax.jit
    def run(params):
        prepared = _prepare(config, params, condition, context, rate, domain)
        steps = lambda x, t: jnp.full(x.shape[:2], t)
        predict = lambda x, t: predict_v(config, params, x, steps(x, t), prepared)
        if guidance != 1.0:
            blank = _prepare(config, params, bare, blank_context, rate, domain)
            conditional = predict

            def predict(x, t):
                unconditional = predict_v(config, params, x, steps(x, t), blank)
                return guide(conditional(x, t), unconditional, guidance, rescale)

        image_latents = videos(condition[:, :channels], config.views)
        noise = jnp.stack([videos(row, config.views) for row in step_noise])
        return sample_chunk(predict, image_latents, videos(start_noise, config.views), noise, tables)

    final, (x, x0) = run(params)
    stack = lambda rows: np.stack([foreign_videos(row) for row in rows])
    return foreign_videos(final), stack(x), stack(x0)


def _check_loss(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    x0, noise = videos(arrays["in_x0"], config.views), videos(arrays["in_noise"], config.views)
    t = jnp.asarray(arrays["in_t"])[:: config.views]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_function(params):
        context, rate, domain = arrays["in_context"], arrays["in_fs"], arrays["in_domain_id"]
        prepared = _prepare(config, params, arrays["in_c_concat"], context, rate, domain)
        error, _ = losses.v_error(config, params, x0, noise, t, prepared)
        _, noisy, _, _ = losses.noisy_latents(config, x0, noise, t)
        steps = jnp.broadcast_to(t[:, None], x0.shape[:2])
        return error.mean(), predict_v(config, params, noisy, steps, prepared)

    (loss, prediction), gradients = loss_function(params)
    scaled, noisy, target, _ = losses.noisy_latents(config, x0, noise, t)
    for name, ours in (("x_scaled", scaled), ("x_noisy", noisy), ("target", target), ("pred", prediction)):
        yield compare(name, foreign_videos(ours), arrays[f"out_{name}"], 5e-5)
    yield compare("loss", loss, arrays["out_loss"], 1e-6)
    exported = dict(export_tensors(evac_rows(config), gradients))
    for name in (name for name in arrays if name.startswith("out_grad:")):
        reference = arrays[name]
        tolerance = 1e-6 + 1e-4 * float(np.abs(reference).max())
        yield compare(name[len("out_") :], exported[name[len("out_grad:") :]], reference, tolerance)


def _check_teacher_forcing(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    del params
    history = videos(arrays["in_history"], 1)
    uniform = jnp.asarray(arrays["in_uniform"])[:, None]
    noise = np.moveaxis(arrays["in_noise_bf"], 1, -1).reshape(history.shape)
    noised = losses.noise_history(config, history, uniform, jnp.asarray(arrays["in_div"]), noise)
    yield compare("history", foreign_videos(noised), arrays["out"], 1e-5)


def _check_actions(actions: dict, config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    del params
    rows, camera = arrays["in_action16"], arrays["in_c2w"].astype(np.float64)
    deltas = two_arm_deltas(rows)
    yield compare("deltas", deltas, arrays["out_delta"], 1e-9)
    for name in (name for name in arrays if name.startswith("out_delta_norm_sep")):
        stride = int(name[len("out_delta_norm_sep") :])
        statistics = [stride * np.asarray(actions[f"stat_{kind}"]) for kind in ("mean", "std")]
        yield compare(name[len("out_") :], normalize_deltas(deltas, *statistics), arrays[name], 1e-5)
    poses = drawn_poses(rows, config.history)
    yield compare("drawn poses", poses, arrays["out_abs_vis"], 1e-9)
    intrinsics, (source_height, source_width) = arrays["in_K"].astype(np.float64), arrays["in_source_hw"]
    for size in (name[len("out_K_") :] for name in arrays if name.startswith("out_K_") and "latent" not in name):
        height, width = (int(n) for n in size.split("x"))
        scaled = scale_intrinsics(intrinsics, height / source_height, width / source_width)
        yield compare(f"intrinsics {size}", scaled.astype(np.float32), arrays[f"out_K_{size}"], 1e-4)
        pictures = draw_pictures(poses, scaled, camera, config.action_map, height, width)
        yield compare(f"trajectory images {size}", pictures, arrays[f"out_traj_uint8_{size}"], 0)
        latent = scale_intrinsics(scaled, 1 / 8, 1 / 8)
        yield compare(f"latent intrinsics {size}", latent.astype(np.float32), arrays[f"out_K_latent_{size}"], 1e-4)
        rays = ray_maps(np.broadcast_to(latent, (len(camera), 3, 3)), camera, height // 8, width // 8)[::3]
        yield compare(f"ray direction {size}", rays[..., :3], arrays[f"out_ray_dir_{size}"], 1e-6)
        yield compare(f"ray origin {size}", rays[..., 3:], arrays[f"out_ray_origin_{size}"], 1e-6)


def _check_rollout(config: SimulatorConfig, params: Params, arrays: dict) -> Iterator[Result]:
    plan = plan_poses(
        config, arrays["in_action16"], arrays["in_c2w"], arrays["in_K"], tuple(arrays["in_source_hw"]),
        int(arrays["in_stat_sep"]),
    )  # fmt: skip
    yield compare("deltas", plan.deltas, arrays["in_delta_norm"], 1e-5)
    yield compare("drawn poses", drawn_poses(arrays["in_action16"], config.history), arrays["in_abs_vis"], 1e-9)
    if "out_traj_uint8" in arrays:
        yield compare("trajectory images", plan.pictures, arrays["out_traj_uint8"], 0)
    for scale in np.atleast_1d(arrays["in_cfg_scales"]):
        guided = replace(
            config,
            ddim_steps=int(arrays["in_ddim_steps"]),
            eta=float(arrays["in_eta"]),
            guidance=float(scale),
            guidance_rescale=float(arrays["in_guidance_rescale"]),
            frame_rate=int(np.ravel(arrays["in_fs"])[0]),
            domain=int(np.ravel(arrays["in_domain_id"])[0]),
        )
        prefix = f"cfg{float(scale):g}_" if f"out_cfg{float(scale):g}_latents" in arrays else f"cfg{float(scale)}_"
        part = {
            f"{kind}_{name.split(prefix, 1)[1]}": arrays[name]
            for kind in ("in", "out")
            for name in arrays
            if name.startswith(f"{kind}_{prefix}")
        }
        yield from _check_free_rollout(prefix, guided, params, arrays["in_image"], plan, part)
        yield from _check_chunks(prefix, guided, params, part)


def _check_free_rollout(
    prefix: str, config: SimulatorConfig, params: Params, image: np.ndarray, plan, part: dict
) -> Iterator[Result]:
    """Our own chain from the first image, the fixture's noise injected."""
    start, step = part["in_start_noise"], part["in_step_noise"]
    noise = lambda chunk, _: (videos(start[chunk], 1), jnp.stack([videos(row, 1) for row in step[chunk]]))
    chunks = list(rollout_poses(config, params, image.transpose(1, 2, 0), plan, len(start), noise))
    guided = config.guidance != 1.0
    stack = lambda function: np.stack([np.asarray(function(chunk)) for chunk in chunks])
    channels = config.unet.latent_channels
    condition = part["out_c_concat"]
    maps = slice(channels + 1, 2 * channels + 1)
    yield compare(f"{prefix}map latents", stack(lambda c: foreign_videos(c.inputs.maps)), condition[:, :, maps], 3e-3)
    rays = stack(lambda c: foreign_videos(c.inputs.rays))
    yield compare(f"{prefix}rays", rays, condition[:, :, maps.stop :], 1e-5)
    latents = stack(lambda c: foreign_videos(c.latents))
    yield compare(f"{prefix}free latents", latents, part["out_latents"], 2e-2 if guided else 2e-3)
    frames = np.concatenate([np.asarray(chunk.frames) for chunk in chunks])
    yield compare(f"{prefix}free video", frames, part["out_video_uint8"], 2)


def _check_chunks(prefix: str, config: SimulatorConfig, params: Params, part: dict) -> Iterator[Result]:
    """Each chunk apart, from the fixture's own conditioning."""
    latents, frames = [], []
    for chunk in range(len(part["in_start_noise"])):
        blank = part["out_uncond_context"][chunk] if config.guidance != 1.0 else None
        out, _, _ = sample_reference(
            config, params, part["out_c_concat"][chunk], part["out_context"][chunk], blank,
            part["in_start_noise"][chunk], part["in_step_noise"][chunk], np.array([config.frame_rate]),
            np.array([config.domain]), config.eta, config.guidance, config.guidance_rescale,
        )  # fmt: skip
        latents.append(out)
        frames.append(decode_latents(config, params, videos(out, 1)[0, 0, config.history :]))
    yield compare(f"{prefix}chunk latents", np.stack(latents), part["out_latents"], 3e-4)
    yield compare(f"{prefix}chunk video", np.concatenate(frames), part["out_video_uint8"], 1)
