# SPDX-License-Identifier: Apache-2.0
"""Every number of the world simulator, and the presets: one model family in four sizes."""

from dataclasses import dataclass, replace

from worldenv_jax.networks.resampler import ResamplerConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.simulator.action_maps import ActionMapConfig
from worldenv_jax.simulator.autoencoder import AutoencoderConfig
from worldenv_jax.simulator.compositing import PATCH
from worldenv_jax.simulator.noise_schedule import ScheduleConfig
from worldenv_jax.simulator.video_unet import VideoUNetConfig

# action (7), normalised proprioception (8), motion since the last history frame (6)
FRAME_FEATURES = 21


@dataclass(frozen=True)
class SimulatorConfig:
    """The world simulator; the defaults are EVAC's released model."""

    image_size: tuple[int, int] = (320, 512)  # height, width
    views: int = 1
    hand_views: tuple[int, ...] = ()  # cameras that move with the hand
    history: int = 4  # F
    chunk: int = 16  # K
    max_chunks: int = 16  # T that the memory has room for
    # Differs from EVAC where not 1: of a chunk only every so many-th frame is generated, and stands for those before
    # it, too. Equal to the chunk it costs least, and the policy still sees what it looks at.
    frame_stride: int = 1
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    latent_scale: float = 0.18215  # brings latents to about unit variance; see `measure_latent_scale`
    unet: VideoUNetConfig = VideoUNetConfig()
    image_encoder: ViTConfig = ViTConfig.openclip_huge()
    image_resampler: ResamplerConfig = ResamplerConfig(queries=256, input_width=1280)
    action_resampler: ResamplerConfig = ResamplerConfig()
    arms: int = 2  # arm slots of the delta actions; a single arm fills them all
    action_map: ActionMapConfig = ActionMapConfig()
    # Whether action maps pass through the autoencoder. Differs from EVAC where False: their pixels are gathered into
    # the channels of a latent pixel, which costs nothing and keeps every detail.
    map_latents: bool = True
    frame_rate: int = 2
    domain: int = 11  # row of the domain embedding: AgiBotWorld
    schedule: ScheduleConfig = ScheduleConfig()
    ddim_steps: int = 27
    eta: float = 1.0
    guidance: float = 1.0  # 1: one pass per step
    guidance_rescale: float = 0.7
    # Differs from EVAC where given: the denoiser corrects a guess made of its input and of the newest known frame, as
    # if frames differed from it by this variance (in scaled latents); see `conditioning.guess_v`. Learns much sooner.
    change_variance: float | None = None
    # Differs from EVAC where not 0: the denoiser corrects a first picture of every frame, which `compositing` makes of
    # the history as it would look if everything stood still, on planes at these heights (m, above the lowest place
    # of the workspace), and if everything moved with the hand (`reprojection`), and of a drawing of its own.
    compositor_width: int = 0
    plane_heights: tuple[float, ...] = (0.03, 0.0, 0.07, 0.12)
    # Width and height of photographs, the first frame of every camera at a finer resolution: the hand's cameras are
    # shown from them what they will come to, where a pixel of image_size is wide. 0: none.
    photograph_size: int = 0
    # Side of the squares that are cut from the first standing camera's photograph where the hand is, in pixels of the
    # photograph; compositor and arm learn from them what is grasped (`simulator/glance.py`). 0: none.
    glance_size: int = 0
    motion_width: int = 0  # of `arm_motion.ArmMotion`, which corrects the deterministic step; 0: off
    frame_by_frame: bool = False  # in a roll-out, through the autoencoder: 1 / K of its memory, some time
    land_on_x0: bool = False  # Differs from EVAC where True: the last DDIM step returns x0 without residual noise
    # Training
    condition_dropout: float = 0.1
    history_noise: tuple[int, int] = (3, 20)  # divisors of the history's noise steps, inclusive: larger is cleaner
    sampled_steps_only: bool = False  # Differs from EVAC where True: trains only the noise steps that sampling visits
    reference_quirks: bool = False  # EVAC's published roll-out to the letter; see `pose_rollout`

    def __post_init__(self):
        errors = []
        factor = self.autoencoder.downsampling * 2 ** (len(self.unet.multipliers) - 1)
        if any(size % factor for size in self.image_size):
            errors.append(f"image_size {self.image_size} is not a multiple of {factor}")
        expected = {
            "unet.latent_channels": (self.unet.latent_channels, self.autoencoder.latent_channels),
            "unet.condition_channels": (self.unet.condition_channels, self.condition_channels),
            "image_resampler.input_width": (self.image_resampler.input_width, self.image_encoder.width),
            "image_resampler.output_width": (self.image_resampler.output_width, self.unet.context_width),
            "action_resampler.input_width": (self.action_resampler.input_width, 7 * self.arms),
            "action_resampler.output_width": (self.action_resampler.output_width, self.unet.context_width),
        }
        errors += [f"{name} is {got}, must be {need}" for name, (got, need) in expected.items() if got != need]
        if self.unet.frame_features not in (0, FRAME_FEATURES):
            errors.append(f"unet.frame_features is {self.unet.frame_features}, must be 0 or {FRAME_FEATURES}")
        if self.compositor_width and len(set(self.hand_views)) == self.views:
            errors.append("with compositor_width, one camera must stand still")
        if self.photograph_size and not (self.compositor_width and self.hand_views):
            errors.append("photograph_size needs compositor_width and hand_views: nothing else looks at photographs")
        if self.glance_size % 8 or self.glance_size > self.photograph_size:
            sizes = f"glance_size is {self.glance_size}, photograph_size {self.photograph_size}"
            errors.append(f"{sizes}: the former must be a multiple of 8 and not larger than the latter")
        if self.compositor_width and any(size % PATCH for size in self.image_size):
            errors.append(f"with compositor_width, image_size must be multiples of {PATCH}, got {self.image_size}")
        if self.autoencoder.principal and not self.autoencoder.shortcut:
            errors.append("autoencoder.principal needs autoencoder.shortcut")
        if self.frame_stride < 1 or self.chunk % self.frame_stride:
            errors.append(f"frame_stride is {self.frame_stride}, must be a divisor of the chunk of {self.chunk}")
        if self.history < 2:
            errors.append(f"history is {self.history}, must be at least 2")
        if errors:
            raise ValueError("simulator configuration: " + "; ".join(errors))

    @property
    def motion_views(self) -> tuple[int, ...]:
        """The cameras that `ArmMotion` sees: the hand's; where there are none, all."""
        return self.hand_views or tuple(range(self.views))

    @property
    def photographs_shape(self) -> tuple[int, int, int, int]:
        """[V, H', W', 3]; without photographs these are empty."""
        return self.views, self.photograph_size, self.photograph_size, 3

    @property
    def pictures(self) -> int:
        """P, the frames of a chunk that are generated: all K unless there is a stride."""
        return self.chunk // self.frame_stride

    @property
    def frames(self) -> int:
        """F + P, what the denoiser sees."""
        return self.history + self.pictures

    @property
    def map_channels(self) -> int:
        """Channels of an action map at latent resolution."""
        return self.autoencoder.latent_channels if self.map_latents else 3 * self.autoencoder.downsampling**2

    @property
    def condition_channels(self) -> int:
        """Image latent, mask, action map, ray direction and origin."""
        return self.autoencoder.latent_channels + 1 + self.map_channels + 6

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        height, width = self.image_size
        return height // self.autoencoder.downsampling, width // self.autoencoder.downsampling

    @classmethod
    def debug(cls) -> "SimulatorConfig":
        """As small as it gets: 32 px, chunks of 4, a U-Net of one resolution with attention in its middle."""
        autoencoder = AutoencoderConfig(8, (1, 2), 1, 4, 4, norm_groups=4, shortcut=True, kl_weight=2e-6)
        config = _small(32, 4, autoencoder, 16, (1,), (), 32, 16)
        return replace(config, ddim_steps=2, max_chunks=4)

    @classmethod
    def tabletop(cls) -> "SimulatorConfig":
        """One 64 px view, chunks of 8: minutes on a CPU. The sizes of the shipped tabletop simulator."""
        autoencoder = AutoencoderConfig(64, (1,), 1, 16, 4, norm_groups=8, shortcut=True, kl_weight=1e-5)
        config = _small(64, 8, autoencoder, 32, (1, 2, 2), (2,), 64, change_variance=0.2)
        # The world is deterministic: one step from pure noise, where the loss is that of a regression.
        return replace(config, ddim_steps=1)

    @classmethod
    def libero_debug(cls) -> "SimulatorConfig":
        """Everything that `libero_cpu` has, as small as it gets."""
        autoencoder = AutoencoderConfig(8, (1,), 1, 8, 8, norm_groups=4, shortcut=True, principal=True)
        return replace(
            _small(64, 8, autoencoder, 16, (1,), (), 32, 16, 0.2, True, compositor_width=8),
            ddim_steps=2,
            photograph_size=128,
            glance_size=16,
        )

    @classmethod
    def libero_cpu(cls) -> "SimulatorConfig":
        """64 px, agentview and wrist, chunks of 8: the tabletop's U-Net, linear latents, a corrected arm."""
        # 24 principal components of 4 x 4 patches keep 43 dB of LIBERO's frames.
        autoencoder = AutoencoderConfig(64, (1,), 1, 24, 4, norm_groups=8, shortcut=True, principal=True)
        config = _small(64, 8, autoencoder, 32, (1, 2, 2), (2,), 64, change_variance=0.2, wrist=True)
        return replace(config, ddim_steps=1, photograph_size=256, glance_size=32)

    @classmethod
    def libero_small(cls) -> "SimulatorConfig":
        """128 px, agentview and wrist, chunks of 8: one GPU, or a patient CPU."""
        autoencoder = AutoencoderConfig(64, (1, 1), 1, 16, 4, norm_groups=8, shortcut=True, kl_weight=2e-6)
        return replace(_small(128, 8, autoencoder, 64, (1, 2, 2), (0, 1), 128, wrist=True), photograph_size=256)

    @classmethod
    def libero_full(cls) -> "SimulatorConfig":
        """EVAC's size at 256 px with LIBERO's chunk of 8 and few-step sampling; starts from the EVAC checkpoint."""
        drawing = ActionMapConfig(tool_offset=0.0, radius=40, thickness=6, background=0)
        return cls(
            image_size=(256, 256), chunk=8, max_chunks=64, ddim_steps=5, eta=0.0, action_map=drawing,
            frame_by_frame=True,
        )  # fmt: skip


def _small(
    size: int,
    chunk: int,
    autoencoder: AutoencoderConfig,
    channels: int,
    multipliers: tuple[int, ...],
    attention_levels: tuple[int, ...],
    width: int,
    head_dim: int = 32,
    change_variance: float | None = None,
    wrist: bool = False,
    compositor_width: int = 96,
) -> SimulatorConfig:
    """A preset that trains from scratch, for one arm; `wrist`: LIBERO's two cameras, the second on the hand."""
    condition = autoencoder.latent_channels + 1 + 3 * autoencoder.downsampling**2 + 6
    moving = {
        "views": 2,
        "hand_views": (1,),
        "compositor_width": compositor_width,
        "motion_width": 96,
        "max_chunks": 64,
    }
    resampler = ResamplerConfig(16, 7, width, width, 2, width // 32, 32)
    return SimulatorConfig(
        image_size=(size, size),
        chunk=chunk,
        autoencoder=autoencoder,
        latent_scale=1.0,
        unet=VideoUNetConfig(
            channels=channels,
            multipliers=multipliers,
            res_blocks=1,
            attention_levels=attention_levels,
            head_dim=head_dim,
            init_attention_heads=channels // head_dim,
            context_width=width,
            latent_channels=autoencoder.latent_channels,
            condition_channels=condition,
            domains=1,
            norm_groups=8,
            frame_features=FRAME_FEATURES,
        ),
        image_encoder=ViTConfig(size, 8, width, 2, width // 32, 2 * width),
        image_resampler=replace(resampler, input_width=width),
        action_resampler=resampler,
        arms=1,
        action_map=ActionMapConfig(0.0, 0.1, size / 24, size / 48, 0),
        map_latents=False,
        domain=0,
        schedule=ScheduleConfig(base_scale=1.0),
        ddim_steps=4,
        change_variance=change_variance,
        eta=0.0,
        land_on_x0=True,
        condition_dropout=0.0,
        history_noise=(20, 200),
        sampled_steps_only=True,
        **(moving if wrist else {}),
    )
