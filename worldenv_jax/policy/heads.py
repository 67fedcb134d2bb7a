# SPDX-License-Identifier: Apache-2.0
"""The modules around the decoder: projectors, action head, scale head. Sources: OpenVLA-OFT, RIPT-VLA."""

from flax import linen as nn

from worldenv_jax.networks.lora import Dense
from worldenv_jax.types import Array


class Projector(nn.Module):
    """Linear layers with exact GELU between them (and after the last but one)."""

    widths: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for number, width in enumerate(self.widths, start=1):
            if number > 1:
                x = nn.gelu(x, approximate=False)
            x = Dense(width, dtype=self.dtype, name=f"fc{number}")(x)
        return x


class MLPResNet(nn.Module):
    """LayerNorm, linear, ReLU, residual blocks x + ReLU(linear(LayerNorm x)), LayerNorm, linear."""

    width: int
    blocks: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self._dense("fc1", self.width)(self._norm("layer_norm1")(x)))
        for i in range(self.blocks):
            x = x + nn.relu(self._dense(f"block_{i}_fc", self.width)(self._norm(f"block_{i}_norm")(x)))
        return self._dense("fc2", self.features)(self._norm("layer_norm2")(x))

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, dtype=self.dtype, name=name)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name=name)


class ScaleHead(nn.Module):
    """Action hidden states [B, K, A * D] -> log b [B, K, A], before clipping (RIPT-VLA's `LaplaceScaleHead`)."""

    width: int
    blocks: int
    action_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = MLPResNet(self.width, self.blocks, self.width, self.dtype, name="trunk")(x)
        # Small weights around b = exp(-3): the first policy explores little and alike everywhere.
        small = nn.initializers.variance_scaling(1e-4, "fan_avg", "uniform")
        bias = nn.initializers.constant(-3.0)
        return Dense(self.action_dim, dtype=self.dtype, kernel_init=small, bias_init=bias, name="log_b_head")(x)
