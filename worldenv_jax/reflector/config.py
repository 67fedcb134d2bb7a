# SPDX-License-Identifier: Apache-2.0
"""Sizes and choices of the instant reflector (World-Env, section on the instant reflector)."""

from dataclasses import dataclass, replace

from worldenv_jax.networks.llama import LlamaConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.reflector.llava import LlavaConfig

SMALL_VOCABULARY = 512
IMAGE_TOKEN = 4  # <image> of the shipped tokenizer


@dataclass(frozen=True)
class ReflectorConfig:
    """A vision-language model that judges, frame by frame, whether an instruction is done.

    `mode` says what it reads at frame t: "streaming" keeps all frames so far in a key-value cache; "uniform" reads at
    most `sampled_frames` of them, evenly spaced (the paper), or frame t alone if that is 1. `kind` says what answers: a
    trained "reward_head", or the language model's "answer", yes or no, to `question` (the paper's ablation; "uniform"
    only).
    """

    llava: LlavaConfig
    image_size: int  # of the frames that it is given, square
    views: int = 1
    max_frames: int = 64  # an episode has at most so many, its first one included
    text_length: int = 32
    mode: str = "streaming"
    sampled_frames: int = 32
    kind: str = "reward_head"
    bidirectional_frames: bool = True  # a frame's tokens see each other; False: strictly causal, as pretrained
    freeze_llava: bool = False  # train the reward head only (and adapters where lora_rank > 0)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    temperature: float = 1.0  # R = sigmoid(logit / temperature), fitted on held-out episodes
    prompt: str = "{instruction}"
    question: tuple[int, ...] = ()  # token ids asked after the frames
    yes_token: int = 0
    no_token: int = 0
    tokenizer: str | None = None  # a tokenizer.json; None: the shipped one

    def __post_init__(self):
        if self.mode not in ("streaming", "uniform"):
            raise ValueError(f"reflector mode {self.mode!r} is neither 'streaming' nor 'uniform'")
        if self.kind not in ("reward_head", "answer"):
            raise ValueError(f"reflector kind {self.kind!r} is neither 'reward_head' nor 'answer'")
        if self.kind == "answer" and (self.mode != "uniform" or not self.question):
            raise ValueError(
                f"a reflector of kind 'answer' needs mode 'uniform' and a question, got mode {self.mode!r} and "
                f"{len(self.question)} question tokens: make one with `answering(config, ...)`"
            )

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame, all views together."""
        return self.views * self.llava.frame_grid**2

    @property
    def cache_length(self) -> int:
        """Slots for the instruction and every frame of an episode."""
        return self.text_length + self.max_frames * self.frame_tokens

    @classmethod
    def debug(cls) -> "ReflectorConfig":
        """For tests: 32 px, compiles in seconds."""
        vision = ViTConfig(32, 8, 16, 1, 2, 32)
        return cls(_small(vision, LlamaConfig(SMALL_VOCABULARY, 16, 32, 1, 2, 1, **_SMALL), 2), 32, max_frames=33)

    @classmethod
    def tabletop(cls) -> "ReflectorConfig":
        """One 64 px view, 4 tokens per frame."""
        vision = ViTConfig(64, 8, 64, 3, 2, 128, activation="quick_gelu")
        language = LlamaConfig(SMALL_VOCABULARY, 96, 192, 2, 4, 2, **_SMALL)
        return cls(_small(vision, language, 2), 64, max_frames=49, text_length=16)

    @classmethod
    def libero_cpu(cls) -> "ReflectorConfig":
        """Two 64 px views of LIBERO-Object (280 steps), 4 tokens per view; the newest frame alone.

        Reading the frames before, too, it learned when successes come instead of what they look like (README).
        """
        tabletop = cls.tabletop()
        return replace(tabletop, views=2, max_frames=289, text_length=48, mode="uniform", sampled_frames=1)

    @classmethod
    def libero_small(cls) -> "ReflectorConfig":
        """Two 128 px views of LIBERO-Object (280 steps), 4 tokens per view; the newest frame alone, as `libero_cpu`."""
        vision = ViTConfig(128, 16, 128, 4, 4, 384)
        language = LlamaConfig(SMALL_VOCABULARY, 128, 256, 3, 4, 2, **_SMALL)
        return replace(cls.libero_cpu(), llava=_small(vision, language, 2), image_size=128)

    @classmethod
    def libero_full(cls) -> "ReflectorConfig":
        """LLaVA-OneVision-0.5B, frozen but for the reward head, on at most 32 frames (the paper's reading)."""
        return cls(
            LlavaConfig.onevision_0_5b(),
            256,
            max_frames=529,
            text_length=64,
            mode="uniform",
            bidirectional_frames=False,
            freeze_llava=True,
            tokenizer="llava-onevision-qwen2-0.5b-ov-hf/tokenizer.json",
        )

    @classmethod
    def libero_full_llava(cls) -> "ReflectorConfig":
        """LLaVA-1.5-7B in the place of OneVision."""
        tokenizer = "llava-1.5-7b-hf/tokenizer.json"
        return replace(cls.libero_full(), llava=LlavaConfig.llava_1_5_7b(), tokenizer=tokenizer)


_SMALL = {"qkv_bias": True, "tie_embeddings": True}  # Qwen2's decoder


def _small(vision: ViTConfig, language: LlamaConfig, frame_grid: int) -> LlavaConfig:
    return LlavaConfig(vision, language, IMAGE_TOKEN, frame_grid)


def trainable_patterns(config: ReflectorConfig) -> tuple[str, ...]:
    """Regular expressions for the '/'-joined names of the trained leaves, matched from the start of the name."""
    if not config.freeze_llava:
        return (r".*",)
    return (r"params/reward_head/", *((r"lora/",) if config.lora_rank else ()))
