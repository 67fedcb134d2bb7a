# SPDX-License-Identifier: Apache-2.0
"""The perceiver resampler: shapes, and that it cannot tell the order of its tokens."""

import jax
import numpy as np

from worldenv_jax.networks.resampler import Resampler, ResamplerConfig

CONFIG = ResamplerConfig(queries=5, input_width=6, width=16, output_width=8, layers=2, heads=2, head_dim=4)


def test_any_number_of_tokens_becomes_the_queries():
    model = Resampler(CONFIG)
    params = model.init(jax.random.key(0), np.zeros((1, 1, 6), np.float32))
    for count in (1, 9):
        assert model.apply(params, np.ones((3, count, 6), np.float32)).shape == (3, 5, 8)


def test_order_of_tokens_does_not_matter():
    model = Resampler(CONFIG)
    tokens = np.random.default_rng(0).normal(size=(2, 7, 6)).astype(np.float32)
    params = model.init(jax.random.key(0), tokens)
    np.testing.assert_allclose(model.apply(params, tokens), model.apply(params, tokens[:, ::-1]), atol=1e-5)
    changed = tokens.copy()
    changed[:, 0] += 1.0
    assert np.abs(model.apply(params, tokens) - model.apply(params, changed)).max() > 1e-3


def test_published_sizes():
    count = lambda config: sum(
        leaf.size
        for leaf in jax.tree.leaves(
            jax.eval_shape(
                lambda key: Resampler(config).init(key, np.zeros((1, 1, config.input_width), np.float32)),
                jax.random.key(0),
            )
        )
    )
    assert count(ResamplerConfig()) == 47_245_312
    assert count(ResamplerConfig(queries=256, input_width=1280)) == 48_787_456
