# SPDX-License-Identifier: Apache-2.0
"""The vision-language-action model. Source: OpenVLA-OFT (arXiv 2502.19645); scale head and prefix mask: RIPT-VLA.

A sequence is

    BOS | patches of V images | [proprioception] | [diffusion timestep] | rest of the prompt | action slots | stop

and the heads read the hidden states one position before each slot: at the last prompt token and all slots but the
last. The model computes it in two blocks,

    context = BOS, patches, [proprioception], prompt without its last token, padding
    actions = [timestep], last prompt token, action slots, stop

with explicit positions and a key mask. Attention knows no other order, so the padding of shorter prompts may stay
where it is, and the positions that the heads read are the same in every row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from worldenv_jax.networks.llama import Cache, Llama, init_cache
from worldenv_jax.networks.vision_transformer import VisionTransformer
from worldenv_jax.policy.config import PolicyConfig
from worldenv_jax.policy.diffusion import timestep_embedding
from worldenv_jax.policy.heads import MLPResNet, Projector, ScaleHead
from worldenv_jax.types import Array, Text


class Inputs(NamedTuple):
    """What the model reads, normalised."""

    dino_images: Array  # float32 [B, V, H, W, 3]
    siglip_images: Array  # float32 [B, V, H, W, 3]
    proprio: Array  # float32 [B, 8]
    text: Text


class Context(NamedTuple):
    """The part of a sequence that does not depend on the action slots."""

    embeddings: Array  # [B, N, D]
    positions: Array  # int32 [B, N]
    valid: Array  # bool [B, N]
    last_token: Array  # [B, 1, D], embedding of the last prompt token
    last_position: Array  # int32 [B, 1]
    cache: Cache | None  # keys and values of the context, where the prefix mask lets them be computed once


class Hidden(NamedTuple):
    """Hidden states after the final norm, with the place of each in the sequence."""

    states: Array  # [B, N, D]
    positions: Array  # int32 [B, N]
    valid: Array  # bool [B, N], False on padding


class Policy(nn.Module):
    """Images, proprioception and prompt in; `loc` and unclipped log scale of the action chunk out."""

    config: PolicyConfig

    def setup(self):
        config, width, dtype = self.config, self.config.llama.width, self.config.llama.dtype
        self.dino = VisionTransformer(config.dino)
        self.siglip = VisionTransformer(config.siglip)
        vision_width = config.dino.width + config.siglip.width
        self.projector = Projector((4 * vision_width, width, width), dtype)
        self.llama = Llama(config.llama)
        self.action_head = MLPResNet(config.head_width, config.head_blocks, config.action_dim, dtype)
        if config.use_proprio:
            self.proprio_projector = Projector((width, width), dtype)
        if config.head == "l1":
            self.scale_head = ScaleHead(config.head_width, config.head_blocks, config.action_dim, dtype)
        else:
            self.noisy_action_projector = Projector((width, width), dtype)

    def __call__(self, inputs: Inputs) -> tuple[Array, Array]:
        """The L1 / Laplace policy: (loc, log scale), float32 [B, K, A] each."""
        hidden = self.action_hidden(self.decode(self.encode(inputs)))
        return self.action_head(hidden).astype(jnp.float32), self.scale_head(hidden).astype(jnp.float32)

    def denoise(self, context: Context, noisy_actions: Array, timestep: Array) -> Array:
        """The diffusion policy: predicted noise float32 [B, K, A] of noisy actions [B, K, A] at int32 [B]."""
        slots = self.noisy_action_projector(noisy_actions.reshape(len(noisy_actions), -1, 1))
        hidden = self.decode(context, slots, timestep_embedding(timestep, self.config.llama.width))
        return self.action_head(self.action_hidden(hidden)).astype(jnp.float32)

    def vision_features(self, inputs: Inputs) -> tuple[Array, Array]:
        """Patch features of both towers, [B, V * patches, D_tower] each, without prefix tokens."""
        film = self._instruction(inputs.text) if self.config.film else None
        return tuple(
            self._tower(tower, images, film)
            for tower, images in ((self.dino, inputs.dino_images), (self.siglip, inputs.siglip_images))
        )

    def encode(self, inputs: Inputs) -> Context:
        """Embeds everything but the action slots and, under the prefix mask, runs the decoder over it."""
        config, tokens = self.config, inputs.text.tokens
        batch, length = tokens.shape
        patches = self.projector(jnp.concatenate(self.vision_features(inputs), axis=-1))
        words = self.llama.embed(tokens)
        parts = [words[:, :1], patches, words[:, 1:]]
        if config.use_proprio:
            parts.insert(2, self.proprio_projector(inputs.proprio[:, None]))
        embeddings = jnp.concatenate(parts, axis=1)
        # The diffusion timestep stands between proprioception and prompt: the prompt's positions leave room for it.
        prompt_positions = config.num_inserted + jnp.arange(1, length)
        before = embeddings.shape[1] - (length - 1)
        positions = jnp.concatenate([jnp.arange(before), prompt_positions])
        last = inputs.text.mask.sum(axis=1, keepdims=True) - 1
        valid = jnp.concatenate([jnp.ones((batch, before), bool), jnp.arange(1, length) < last], axis=1)
        context = Context(
            embeddings=embeddings,
            positions=jnp.broadcast_to(positions, valid.shape),
            valid=valid,
            last_token=jnp.take_along_axis(words, last[:, :, None], axis=1),
            last_position=config.num_inserted + last,
            cache=None,
        )
        return self._with_cache(context) if config.attention == "prefix" else context

    def decode(self, context: Context, slots: Array | None = None, timestep: Array | None = None) -> Hidden:
        """Runs the decoder.

        Args:
            context: from `encode`.
            slots: embeddings of the action slots [B, K * A, D]; None: zeros.
            timestep: embedding of the diffusion timestep [B, D], with the diffusion head only.

        Returns: hidden states of the whole sequence; under the prefix mask, of the action block only. The last
            K * A + 2 are those of the last prompt token, the slots and the stop token.
        """
        config, batch = self.config, len(context.embeddings)
        if slots is None:
            slots = jnp.zeros((batch, config.num_slots, config.llama.width), context.embeddings.dtype)
        stop = self.llama.embed(jnp.full((batch, 1), config.stop_token))
        embeddings = jnp.concatenate([context.last_token, slots, stop], axis=1)
        positions = context.last_position + jnp.arange(embeddings.shape[1])
        if timestep is not None:
            embeddings = jnp.concatenate([timestep[:, None].astype(embeddings.dtype), embeddings], axis=1)
            timestep_position = jnp.full((batch, 1), config.num_inserted)
            positions = jnp.concatenate([timestep_position, positions], axis=1)
        valid = jnp.concatenate([context.valid, jnp.ones(positions.shape, bool)], axis=1)
        if context.cache is not None:
            start = context.embeddings.shape[1]
            mask = valid[:, None, None]
            states, _ = self.llama(embeddings, positions, mask, context.cache, start)
            return Hidden(states, positions, valid[:, start:])
        embeddings = jnp.concatenate([context.embeddings, embeddings], axis=1)
        positions = jnp.concatenate([context.positions, positions], axis=1)
        states, _ = self.llama(embeddings, positions, valid[:, None, None])
        return Hidden(states, positions, valid)

    def action_hidden(self, hidden: Hidden) -> Array:
        """The hidden states that the heads read, [B, K, A * D]."""
        config = self.config
        states = hidden.states[:, -config.num_slots - 2 : -2]
        return states.reshape(len(states), config.chunk, -1)

    def _tower(self, tower: VisionTransformer, images: Array, film: Array | None) -> Array:
        batch, views = images.shape[:2]
        film = None if film is None else jnp.repeat(film, views, axis=0)
        tokens = tower(images.reshape(-1, *images.shape[2:]), film)[:, tower.config.num_prefix :]
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def _instruction(self, text: Text) -> Array:
        """Mean embedding of the prompt and the stop token [B, D], which modulates the towers (FiLM)."""
        # Differs from OpenVLA-OFT: padding is left out, so that a row does not depend on the longest prompt beside it.
        stop = self.llama.embed(jnp.full((len(text.tokens), 1), self.config.stop_token))
        words = self.llama.embed(text.tokens) * text.mask[:, :, None]
        return (words.sum(axis=1) + stop[:, 0]) / (text.mask.sum(axis=1, keepdims=True) + 1)

    def _with_cache(self, context: Context) -> Context:
        config, (batch, length) = self.config, context.valid.shape
        room = config.num_slots + 2 + (config.head == "diffusion")
        cache = init_cache(config.llama, batch, length + room)
        mask = jnp.pad(context.valid, ((0, 0), (0, room)))[:, None, None]
        _, cache = self.llama(context.embeddings, context.positions, mask, cache)
        if config.detach_prefix:
            cache = jax.lax.stop_gradient(cache)
        return context._replace(cache=cache)
