# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as a separate pytree (Hu et al. 2021): y = x W + scale * (x A) B.

`Dense` is the linear layer of every network here. It reads A and B from the collection `lora` where that
collection is passed to `apply`, and is a plain linear layer where it is not. A patch convolution is a `Dense` over
flattened patches, so every adapted layer of PEFT's "all-linear" is one of these.

The modules know nothing of the scale alpha / rank: `scale_lora` multiplies it into B where the collection is handed
to a model, which keeps the trained A and B equal to PEFT's. Leaves under an `nn.scan` carry a leading layer axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from worldenv_jax.types import Array, Params


class Dense(nn.Module):
    """Linear layer [..., in] -> [..., features] with an optional low-rank adapter."""

    features: int
    use_bias: bool = True
    dtype: str | None = None  # of the computation; None: promoted from input and kernel
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        # Rows in one axis: XLA's CPU compiler copies both operands of a weight gradient that sums over several.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ kernel
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y += (rows @ a.astype(x.dtype)) @ b.astype(x.dtype)
        if self.use_bias:
            y += self.param("bias", self.bias_init, (self.features,)).astype(y.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def init_lora(key: Array, params: Params, rank: int) -> Params:
    """One adapter per `kernel` leaf of `params`: A ~ N(0, (1 / rank)^2), B = 0 (PEFT's "gaussian").

    Args:
        params: nested dict; leaves named `kernel` are [in, out] or, under a scan, [L, in, out].
        rank: columns of A and rows of B.

    Returns: the same nesting with {"a": float32 [..., in, rank], "b": float32 [..., rank, out]} per kernel.
    """
    kernels = {path[:-1]: leaf for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "kernel"}
    lora = {}
    for leaf_key, (path, kernel) in zip(jax.random.split(key, len(kernels)), sorted(kernels.items())):
        *stack, rows, columns = kernel.shape
        lora[(*path, "a")] = jax.random.normal(leaf_key, (*stack, rows, rank)) / rank
        lora[(*path, "b")] = jnp.zeros((*stack, rank, columns))
    return traverse_util.unflatten_dict(lora)


def scale_lora(lora: Params, scale: float) -> Params:
    """The adapters as `Dense` reads them: every B multiplied by `scale` = alpha / rank."""
    flat = traverse_util.flatten_dict(lora)
    return traverse_util.unflatten_dict({p: x * scale if p[-1] == "b" else x for p, x in flat.items()})


def merge_lora(params: Params, lora: Params, scale: float) -> Params:
    """Kernels with the adapters added, W + scale * A B, computed in float32 and kept in the kernel's dtype.

    `merge_lora(params, lora, -scale)` takes them out again, up to rounding.
    """
    flat, adapters = traverse_util.flatten_dict(params), traverse_util.flatten_dict(lora)
    for path in {path[:-1] for path in adapters}:
        kernel = flat[(*path, "kernel")]
        update = scale * (adapters[(*path, "a")] @ adapters[(*path, "b")])
        flat[(*path, "kernel")] = (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)
