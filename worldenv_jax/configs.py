# SPDX-License-Identifier: Apache-2.0
"""Every setting of an experiment in one frozen tree, and the presets.

A preset is chosen with `--config=<name>` and changed with `--set=group.key=value` (`overrides.py`). The same model
classes run at every size: `debug` (tests), `tabletop` (a laptop), `libero_debug`, `libero_cpu` (four cores and
hours), `libero_small` (one GPU), `libero_full` (the paper's sizes).
"""

import difflib
from dataclasses import dataclass, field, replace
from typing import Literal

from worldenv_jax.critic import CriticConfig
from worldenv_jax.envs import EnvironmentConfig
from worldenv_jax.errors import WorldEnvError
from worldenv_jax.evaluation.gate import GateConfig
from worldenv_jax.loop_ppo import LoopConfig
from worldenv_jax.policy import PolicyConfig
from worldenv_jax.reflector import ReflectorConfig
from worldenv_jax.rollout import RolloutConfig
from worldenv_jax.simulator import SimulatorConfig
from worldenv_jax.training.train_state import OptimizerConfig


@dataclass(frozen=True)
class CollectConfig:
    """How many episodes of which kind."""

    demonstrations_per_task: int = 5
    demonstration_noise: float = 0.1  # Laplace scale on the expert's six deltas
    exploration_per_task: int = 80
    tries_per_start: int = 1  # episodes of training exploration that share a start; held-out ones have their own
    try_again: float = 0.0  # share of training exploration in which a hand that has closed on nothing opens and rises
    exploration_scale: float = 0.7  # multiplies the policy's Laplace scale
    held_out_fraction: float = 0.25  # of the exploration: never trained on, what the gate measures
    after_success: int = 6  # steps that exploration goes on after a success
    starts_per_task: int = 0  # further starts without an episode: imagination begins there, too
    train_on_exploration: bool = True  # False: the simulator sees demonstrations only (ablation)


@dataclass(frozen=True)
class StageConfig:
    """One supervised stage."""

    steps: int = 1000
    batch_size: int = 32
    log_every: int = 20
    save_every: int = 500
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclass(frozen=True)
class ReflectorStageConfig(StageConfig):
    """Training of the reflector."""

    frames: int = 0  # of an episode in a batch, half of them its last ones ("streaming" mode); 0: all
    false_positive_rate: float = 0.02  # per frame; eta is 0.5, or the smallest above it that keeps to this


@dataclass(frozen=True)
class PostTrainingConfig:
    """How much RL, and when to stop it."""

    start_from: Literal["policy", "self_imitated"] = "policy"  # the clone, or `pipeline.imitate_successes` of it
    iterations: int = 12
    starts: int = 8  # S per iteration
    epochs: int = 1  # passes over the rollouts of an iteration
    minibatches: int = 4  # updates per pass
    chunks_at_once: int = 0  # of a trajectory in an update, a divisor of T; less memory, more time. 0: all
    scale_factor: float = 0.5  # multiplies the policy's scale, in sampling and in scoring alike
    max_kl: float = 0.2  # an update whose KL to the behaviour policy exceeds this ends the iteration's updates
    resample_budget: int = 1  # extra rollouts per iteration to replace groups without contrast
    resample_below: float = 0.5  # ... when fewer than this share of groups has contrast
    evaluate_every: int = 4  # iterations between held-out estimates; the best parameters are kept
    held_out_starts: int = 64  # at most; fewer where fewer were collected
    held_out_samples: int = 0  # trajectories of each, sampled as in training; 0: one of the mean action
    critic: CriticConfig = CriticConfig()
    optimizer: OptimizerConfig = OptimizerConfig()  # with ema_decay the averaged policy is estimated and kept


@dataclass(frozen=True)
class PretrainedConfig:
    """Paths of published checkpoints; empty: random parameters."""

    policy: str = ""  # a folder in OpenVLA-OFT's layout
    statistics: str = ""  # dataset in its dataset_statistics.json; may be left out where there is only one
    simulator: str = ""  # an EVAC checkpoint
    image_encoder: str = ""  # open_clip's weights, .pt, .bin or .safetensors
    reflector: str = ""  # a folder with a LLaVA checkpoint


@dataclass(frozen=True)
class AugmentationConfig:
    """Of the images that policy and reflector are trained on, on the device; zeros switch it off."""

    shift: int = 0  # pixels, any direction, edges replicated
    brightness: float = 0.0  # +- in [0, 1] units
    contrast: float = 0.0  # factor 1 +- contrast


@dataclass(frozen=True)
class EvaluationConfig:
    """The measurement in the true world."""

    episodes_per_task: int = 20


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; 0 for `data` means all that remain."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class ExperimentConfig:
    """The whole experiment; saved beside every checkpoint."""

    seed: int = 0
    variant: str = "full"  # name of the row in result tables; the ablations have their own
    environment: EnvironmentConfig = EnvironmentConfig()
    collect: CollectConfig = CollectConfig()
    policy: PolicyConfig = field(default_factory=PolicyConfig.tabletop)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig.tabletop)
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig.tabletop)
    pretrained: PretrainedConfig = PretrainedConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    cloning: StageConfig = StageConfig()
    scale_head: StageConfig = StageConfig()
    autoencoder: StageConfig = StageConfig()
    arm_motion: StageConfig = StageConfig()  # only with simulator.motion_width
    compositor: StageConfig = StageConfig()  # only with simulator.compositor_width
    denoiser: StageConfig = StageConfig()
    reflector_training: ReflectorStageConfig = ReflectorStageConfig()
    rollout: RolloutConfig = RolloutConfig()
    loop: LoopConfig = LoopConfig()
    post_training: PostTrainingConfig = PostTrainingConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        frames = self.rollout.num_chunks * self.policy.chunk + 1
        if self.policy.chunk != self.simulator.chunk:
            raise ValueError(
                f"policy.chunk is {self.policy.chunk}, simulator.chunk is {self.simulator.chunk}: make them equal"
            )
        if self.collect.tries_per_start < 1:
            raise ValueError(f"collect.tries_per_start is {self.collect.tries_per_start}: make it at least 1")
        if not 0.0 <= self.collect.try_again <= 1.0:
            raise ValueError(f"collect.try_again is {self.collect.try_again}, a share: make it 0 to 1")
        views = {name: getattr(self, name).views for name in ("environment", "policy", "simulator", "reflector")}
        if len(set(views.values())) > 1:
            raise ValueError(f"the models see different numbers of views: {views}")
        size = self.environment.image_size
        if self.simulator.image_size != (size, size) or self.reflector.image_size != size:
            raise ValueError(
                f"environment.image_size is {size}, simulator.image_size {self.simulator.image_size}, "
                f"reflector.image_size {self.reflector.image_size}: make them equal"
            )
        photographs = self.environment.photograph_size, self.simulator.photograph_size
        if photographs[0] != photographs[1]:
            raise ValueError(
                "environment.photograph_size is {}, simulator.photograph_size {}: make them equal".format(*photographs)
            )
        if frames > self.reflector.max_frames:
            raise ValueError(f"a rollout has {frames} frames, reflector.max_frames is {self.reflector.max_frames}")
        if self.rollout.num_chunks > self.simulator.max_chunks:
            raise ValueError(
                f"rollout.num_chunks is {self.rollout.num_chunks}, simulator.max_chunks is {self.simulator.max_chunks}"
            )


def _adam(learning_rate: float, steps: int, weight_decay: float = 0.0, **changes) -> OptimizerConfig:
    """Warm-up, then cosine to a tenth, over `steps`."""
    warmup = min(100, max(1, steps // 10))
    return OptimizerConfig(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        final_fraction=0.1,
        weight_decay=weight_decay,
        **changes,
    )


def _stage(steps: int, batch_size: int, learning_rate: float, weight_decay: float = 0.0, **changes) -> StageConfig:
    return StageConfig(steps, batch_size, optimizer=_adam(learning_rate, steps, weight_decay, **changes))


ARM_MOTION = _stage(1500, 64, 3e-3)
SCALE_HEAD = ("scale_head",)  # pattern of the parameters that the second stage of cloning trains


def tabletop() -> ExperimentConfig:
    """The embedded world on a CPU: minutes."""
    return ExperimentConfig(
        collect=CollectConfig(exploration_per_task=200),
        cloning=_stage(1000, 64, 1e-3, 0.01),
        scale_head=_stage(150, 64, 1e-3, trainable=SCALE_HEAD),
        autoencoder=_stage(1200, 16, 2e-3),
        denoiser=_stage(1800, 16, 2e-3, ema_decay=0.995),
        reflector_training=ReflectorStageConfig(1200, 16, optimizer=_adam(2e-3, 1200, 0.01)),
        rollout=RolloutConfig(num_chunks=3),
        post_training=PostTrainingConfig(
            iterations=24,
            starts=32,
            scale_factor=0.7,
            evaluate_every=8,
            held_out_starts=96,
            optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=4, ema_decay=0.95),
        ),
        evaluation=EvaluationConfig(episodes_per_task=50),
        mesh=MeshConfig(data=0),
    )


def debug() -> ExperimentConfig:
    """The embedded world with models that learn nothing but compile in seconds: for tests."""
    policy = PolicyConfig.debug()
    stage = lambda **changes: replace(_stage(4, 4, 1e-3, **changes), log_every=1, save_every=2)
    return ExperimentConfig(
        environment=EnvironmentConfig(image_size=32, slots=8, tasks=2),
        collect=CollectConfig(demonstrations_per_task=1, exploration_per_task=4, held_out_fraction=0.5),
        policy=policy,
        simulator=SimulatorConfig.debug(),
        reflector=replace(ReflectorConfig.debug(), max_frames=49),
        cloning=stage(),
        scale_head=stage(trainable=SCALE_HEAD),
        autoencoder=stage(),
        denoiser=stage(),
        reflector_training=ReflectorStageConfig(4, 4, 1, 2, _adam(1e-3, 4)),
        rollout=RolloutConfig(num_chunks=2, samples=2),
        post_training=PostTrainingConfig(
            iterations=4,
            starts=2,
            minibatches=2,
            evaluate_every=2,
            held_out_starts=2,
            optimizer=OptimizerConfig(ema_decay=0.5),
        ),
        evaluation=EvaluationConfig(episodes_per_task=2),
    )


def libero_debug() -> ExperimentConfig:
    """The real LIBERO simulator, two views, every stage for a moment: does everything run?"""
    base = debug()
    return replace(
        base,
        environment=EnvironmentConfig(
            "libero", "libero_object", 2, image_size=64, views=2, photograph_size=128, slots=2
        ),
        collect=replace(base.collect, after_success=4, starts_per_task=2),
        policy=PolicyConfig.libero_cpu(),
        simulator=SimulatorConfig.libero_debug(),
        reflector=ReflectorConfig.libero_cpu(),
        arm_motion=base.denoiser,
        compositor=base.denoiser,
        reflector_training=ReflectorStageConfig(4, 2, 1, 4, _adam(1e-3, 4)),
        rollout=RolloutConfig(num_chunks=4, samples=2),
    )


# LIBERO-Object ends an episode after 280 steps: 35 chunks of 8.
OBJECT_CHUNKS = 35


def libero_cpu() -> ExperimentConfig:
    """LIBERO-Object, two 64 px views, every model trained from scratch at the tabletop's size: hours on four cores."""
    base = tabletop()
    return replace(
        base,
        environment=EnvironmentConfig(
            "libero", "libero_object", 10, image_size=64, views=2, photograph_size=256, slots=8
        ),
        collect=CollectConfig(
            exploration_per_task=20, tries_per_start=3, try_again=0.5, after_success=24, starts_per_task=40
        ),
        policy=PolicyConfig.libero_cpu(),
        simulator=replace(SimulatorConfig.libero_cpu(), frame_stride=8),  # what the policy looks at, no more
        reflector=ReflectorConfig.libero_cpu(),
        augmentation=AugmentationConfig(shift=2, brightness=0.1, contrast=0.1),
        cloning=_stage(1500, 32, 1e-3, 0.01),
        scale_head=_stage(200, 32, 1e-3, trainable=SCALE_HEAD),
        autoencoder=_stage(0, 32, 2e-3),  # principal components
        arm_motion=ARM_MOTION,
        compositor=_stage(1800, 8, 2e-3),
        denoiser=_stage(1200, 4, 1.2e-3, ema_decay=0.998),
        # Episodes are longer than the tabletop's: half of its rate per frame.
        reflector_training=ReflectorStageConfig(
            1200, 64, optimizer=_adam(1e-3, 1200, 0.01, ema_decay=0.995), false_positive_rate=0.01
        ),
        rollout=RolloutConfig(num_chunks=20),  # successes take 98 to 153 steps
        post_training=PostTrainingConfig(
            iterations=16,
            starts=32,
            chunks_at_once=4,
            resample_budget=0,
            evaluate_every=8,
            held_out_starts=32,
            held_out_samples=8,
            critic=CriticConfig(updates=200),
            optimizer=replace(base.post_training.optimizer, learning_rate=1e-4, trainable=("llama", "action_head")),
        ),
        evaluation=EvaluationConfig(episodes_per_task=50),
    )


def libero_small() -> ExperimentConfig:
    """LIBERO-Object, two 128 px views, every model trained from scratch: one GPU, or a CPU and patience."""
    return ExperimentConfig(
        environment=EnvironmentConfig(
            "libero", "libero_object", 10, image_size=128, views=2, photograph_size=256, slots=4
        ),
        policy=PolicyConfig.libero_small(),
        simulator=replace(SimulatorConfig.libero_small(), max_chunks=OBJECT_CHUNKS),
        reflector=ReflectorConfig.libero_small(),
        augmentation=AugmentationConfig(shift=4, brightness=0.1, contrast=0.1),
        cloning=_stage(6000, 32, 5e-4, 0.01),
        scale_head=_stage(500, 32, 1e-3, trainable=SCALE_HEAD),
        autoencoder=_stage(6000, 16, 1e-3),
        arm_motion=ARM_MOTION,
        compositor=_stage(6000, 8, 1e-3),
        denoiser=_stage(20_000, 8, 5e-4, ema_decay=0.999),
        reflector_training=ReflectorStageConfig(2000, 64, optimizer=_adam(5e-4, 2000, 0.01)),
        rollout=RolloutConfig(num_chunks=OBJECT_CHUNKS),
        post_training=PostTrainingConfig(
            iterations=20,
            starts=4,
            chunks_at_once=5,
            held_out_starts=16,
            optimizer=OptimizerConfig(learning_rate=1e-5),
        ),
        mesh=MeshConfig(data=0),
    )


def libero_full() -> ExperimentConfig:
    """LIBERO-Object at the paper's sizes: OpenVLA-OFT, EVAC and LLaVA-OneVision on 8 GPUs of 80 GB, or a pod.

    One camera and proprioception, as the paper lists them, and as EVAC's checkpoint knows. OpenVLA-OFT's published
    LIBERO policies look through the wrist camera too: environment, policy, simulator and reflector .views=2 and
    simulator.hand_views=1. The autoencoder is trained for runs from scratch; EVAC's is not: autoencoder.steps=0.
    """
    simulator = SimulatorConfig.libero_full()
    unet = replace(simulator.unet, dtype="bfloat16", remat=True)
    lora, heads = "^lora/", "(action|scale)_head"
    return ExperimentConfig(
        environment=EnvironmentConfig("libero", "libero_object", tasks=10, image_size=256, slots=16, starts="official"),
        policy=PolicyConfig.libero_full(views=1),
        simulator=replace(simulator, unet=unet, max_chunks=OBJECT_CHUNKS),
        reflector=ReflectorConfig.libero_full(),
        augmentation=AugmentationConfig(shift=12, brightness=0.2, contrast=0.2),
        # OpenVLA-OFT: AdamW 5e-4 without clipping, 64 per step, 150,005 steps, a tenth of the rate at the end.
        cloning=_stage(150_000, 64, 5e-4, 0.01, clip_norm=None, trainable=(lora, "action_head", "proprio_projector")),
        scale_head=_stage(5000, 64, 1e-4, trainable=SCALE_HEAD),
        autoencoder=_stage(50_000, 32, 1e-4),
        # EVAC: AdamW at a constant 5e-5, clipped at 0.5, 8 per GPU, 100,000 steps; U-Net and image resampler only.
        denoiser=StageConfig(
            100_000,
            64,
            save_every=2000,
            optimizer=OptimizerConfig(
                learning_rate=5e-5,
                trainable=("denoiser/unet/", "denoiser/image_resampler/"),
                weight_decay=0.01,
                clip_norm=0.5,
            ),
        ),
        reflector_training=ReflectorStageConfig(
            5000, 32, optimizer=_adam(1e-4, 5000, 0.01, trainable=("reward_head",))
        ),
        rollout=RolloutConfig(num_chunks=OBJECT_CHUNKS),
        # World-Env: adapters 1e-4, heads 1e-5, 8 samples per start, better than the clone within 20 steps; RIPT-VLA: 24
        # starts, one pass in updates of 16 trajectories, weight decay 1e-4, clipped at 1.
        post_training=PostTrainingConfig(
            iterations=20,
            starts=24,
            minibatches=12,
            scale_factor=1.0,
            optimizer=OptimizerConfig(
                learning_rate=1e-4,
                group_learning_rates=((heads, 1e-5),),
                trainable=(lora, heads),
                weight_decay=1e-4,
                micro_batches=2,
            ),
        ),
        evaluation=EvaluationConfig(episodes_per_task=50),
        mesh=MeshConfig(data=0, fsdp=8),
    )


PRESETS = {preset.__name__: preset for preset in (tabletop, debug, libero_debug, libero_cpu, libero_small, libero_full)}


def get_config(name: str) -> ExperimentConfig:
    """The preset of that name.

    Raises:
      WorldEnvError: no such preset; the message names the nearest one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise WorldEnvError(f"unknown config {name!r}: {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[name]()


# The ablations of the result table (World-Env, table 5 and section 1.4), as changes to any preset; "neither" has
# neither exploration nor the continuous reward.
VARIANTS = {
    "full": lambda config: config,
    "demonstrations_only": lambda config: replace(config, collect=replace(config.collect, train_on_exploration=False)),
    "binary_judge": lambda config: replace(config, rollout=replace(config.rollout, reward="binary")),
    "neither": lambda config: VARIANTS["demonstrations_only"](VARIANTS["binary_judge"](config)),
    "no_early_stop": lambda config: replace(config, rollout=replace(config.rollout, early_stop=False)),
}


def apply_variant(config: ExperimentConfig, name: str) -> ExperimentConfig:
    """An ablation of a config.

    Raises:
      WorldEnvError: no such variant.
    """
    if name not in VARIANTS:
        raise WorldEnvError(f"unknown variant {name!r}: variants are {', '.join(VARIANTS)}")
    return replace(VARIANTS[name](config), variant=name)
