# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a traced program.

XLA's `cost_analysis` counts the body of a scan once, whatever its length; here the jaxpr is walked instead.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable, *arguments: Any) -> int:
    """Operations of one call: see `jaxpr_flops`. Nothing is computed; arguments may be abstract."""
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: Any) -> int:
    """2 x multiply-adds of dots and convolutions; scans times their length, conditionals by their largest branch."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [_open(value) for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
        elif equation.primitive.name == "cond":
            total += max(map(jaxpr_flops, inner))
        else:
            total += equation.params.get("length", 1) * sum(map(jaxpr_flops, inner))
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _open(value: Any) -> Any:
    return getattr(value, "jaxpr", value)
