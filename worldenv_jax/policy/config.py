# SPDX-License-Identifier: Apache-2.0
"""Sizes and variants of the policy. Sources: OpenVLA-OFT (arXiv 2502.19645), RIPT-VLA (arXiv 2505.17016)."""

import dataclasses
from dataclasses import dataclass

from worldenv_jax.networks.llama import LlamaConfig
from worldenv_jax.networks.vision_transformer import ViTConfig
from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM

# The released processors hold the ImageNet constants rounded to bfloat16.
DINO_MEAN = (0.484375, 0.455078125, 0.40625)
DINO_STD = (0.228515625, 0.2236328125, 0.224609375)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PolicyConfig:
    """The policy's architecture; one class for every size.

    `attention` is "bidirectional" (OpenVLA-OFT: every position attends to every unpadded position) or "prefix"
    (RIPT-VLA: the prompt attends to itself, the action slots to everything). `head` is "l1" (with the Laplace
    scale head beside it) or "diffusion".
    """

    dino: ViTConfig
    siglip: ViTConfig
    llama: LlamaConfig
    head_width: int  # hidden width of the action and scale heads
    head_blocks: int = 2
    views: int = 1  # V
    chunk: int = 8  # K
    action_dim: int = ACTION_DIM
    proprio_dim: int = PROPRIO_DIM
    use_proprio: bool = True
    film: bool = False  # the instruction modulates the vision towers (OFT+)
    head: str = "l1"  # "l1" | "diffusion"
    diffusion_steps: int = 50
    attention: str = "bidirectional"  # "bidirectional" | "prefix"
    detach_prefix: bool = False  # "prefix" only: no gradient into towers, projectors and prompt, as in RIPT-VLA
    log_scale_range: tuple[float, float] = (-2.0, 0.5)  # of log b, where it is sampled from and where it is scored
    center_crop: bool = False  # keep the central 90 % of the area of images that have to be resized
    dino_mean: tuple[float, float, float] = DINO_MEAN
    dino_std: tuple[float, float, float] = DINO_STD
    siglip_mean: tuple[float, float, float] = HALF
    siglip_std: tuple[float, float, float] = HALF
    tokenizer: str | None = None  # path of a tokenizer.json; None: the one in `worldenv_jax/assets`
    text_length: int = 24  # prompt tokens, padded to this length
    last_token: int | None = None  # appended to prompts that do not end in it (Llama: 29871, an empty piece)
    stop_token: int = 2  # follows the action slots
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 16.0

    def __post_init__(self):
        problems = [
            f"{name} is {value!r}, expected one of {choices}"
            for name, value, choices in (
                ("head", self.head, ("l1", "diffusion")),
                ("attention", self.attention, ("bidirectional", "prefix")),
            )
            if value not in choices
        ]
        if (self.dino.image_size, self.dino.grid) != (self.siglip.image_size, self.siglip.grid):
            problems.append("the two vision towers differ in image size or in number of patches")
        if self.detach_prefix and self.attention != "prefix":
            problems.append('detach_prefix needs attention="prefix": otherwise the prompt attends to the action slots')
        if self.sequence_length > self.llama.max_positions:
            problems.append(f"a sequence has {self.sequence_length} positions, the decoder {self.llama.max_positions}")
        if problems:
            raise ValueError("policy config: " + "; ".join(problems))

    @property
    def image_size(self) -> int:
        """Side of the images that the towers take, in pixels."""
        return self.dino.image_size

    @property
    def num_inserted(self) -> int:
        """Tokens between BOS and the rest of the prompt: patches, proprioception, diffusion timestep."""
        return self.views * self.dino.grid**2 + self.use_proprio + (self.head == "diffusion")

    @property
    def num_slots(self) -> int:
        """Action slots: one per action dimension of every step in the chunk."""
        return self.chunk * self.action_dim

    @property
    def sequence_length(self) -> int:
        """Positions of the longest sequence: inserted tokens, prompt, action slots, stop token."""
        return self.num_inserted + self.text_length + self.num_slots + 1

    @property
    def lora_scale(self) -> float:
        """alpha / rank."""
        return self.lora_alpha / self.lora_rank

    @classmethod
    def debug(cls, **changes) -> "PolicyConfig":
        """As small as it gets: for tests."""
        fields = {
            "dino": ViTConfig(
                32, 16, 16, 3, 2, 32, class_token=True, register_tokens=1, layer_scale=True, output_layer=-2
            ),
            "siglip": ViTConfig(32, 16, 16, 3, 2, 32, output_layer=-2),
            "llama": LlamaConfig(512, 32, 48, layers=2, heads=2, kv_heads=2),
            "head_width": 32,
            "chunk": 4,
        }
        return cls(**fields | changes)

    @classmethod
    def tabletop(cls, **changes) -> "PolicyConfig":
        """One 64 px view; trains from scratch on a CPU."""
        fields = {
            "dino": ViTConfig(
                64, 8, 64, 4, 4, 128, class_token=True, register_tokens=4, layer_scale=True, output_layer=-2
            ),
            "siglip": ViTConfig(64, 8, 64, 4, 4, 128, output_layer=-2),
            "llama": LlamaConfig(512, 128, 256, layers=4, heads=4, kv_heads=4),
            "head_width": 128,
        }
        return cls(**fields | changes)

    @classmethod
    def libero_cpu(cls, **changes) -> "PolicyConfig":
        """Two 64 px views; the tabletop's sizes behind a convolutional stem; trains from scratch on a CPU."""
        tabletop, stem = cls.tabletop(), (32, 64, 128)
        towers = {name: dataclasses.replace(getattr(tabletop, name), stem=stem) for name in ("dino", "siglip")}
        return dataclasses.replace(tabletop, views=2, text_length=48, **towers | changes)

    @classmethod
    def libero_small(cls, **changes) -> "PolicyConfig":
        """Two 128 px views; trains from scratch on one GPU, or on a CPU with patience."""
        fields = {
            "dino": ViTConfig(
                128, 16, 192, 7, 6, 768, class_token=True, register_tokens=4, layer_scale=True, output_layer=-2
            ),
            "siglip": ViTConfig(128, 16, 192, 7, 6, 768, output_layer=-2),
            "llama": LlamaConfig(512, 384, 1024, layers=6, heads=6, kv_heads=6),
            "head_width": 384,
            "views": 2,
            "text_length": 48,
        }
        return cls(**fields | changes)

    @classmethod
    def libero_full(cls, **changes) -> "PolicyConfig":
        """The published OpenVLA-OFT: 7.5 B parameters, third-person and wrist image, bfloat16."""
        half = {"dtype": "bfloat16", "remat": True}
        fields = {
            "dino": dataclasses.replace(ViTConfig.dinov2_large(), **half),
            "siglip": dataclasses.replace(ViTConfig.siglip_so400m(), **half),
            "llama": LlamaConfig(32064, 4096, 11008, layers=32, heads=32, kv_heads=32, **half),
            "head_width": 4096,
            "views": 2,
            "center_crop": True,
            "text_length": 64,
            "last_token": 29871,
            "lora_rank": 32,
        }
        return cls(**fields | changes)
