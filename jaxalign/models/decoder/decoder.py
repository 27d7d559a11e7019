"""One decoder for every family: its blocks are stacked on a layer axis and run by one scan.

    graphdef, abstract_params = make_decoder(config)
    params = init_params(config, key)          # or models/files/huggingface.py: load_params
    model = nnx.merge(graphdef, params)        # first line of a pure function
    hidden = model(tokens, positions=positions, segment_ids=segment_ids)

Training's compile time does not grow with depth; a call with a cache runs the layers one by one, each with a cache of
its own. Initial weights are normal with the config's initializer_range; kernels that write to the residual stream start
smaller by sqrt(2 L) (GPT-2). Dropout is not applied, because policies and references must agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxalign.config.shared import TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, attach
from jaxalign.models.adapters.quantise import quantise_layers
from jaxalign.models.decoder.attention import IMPLEMENTATIONS, Coordinates
from jaxalign.models.decoder.cache import Cache, LayerCache
from jaxalign.models.decoder.config import LayerKind, ModelConfig
from jaxalign.models.decoder.layers import MLP, Attention, Compute, Embedding, Norm, rotate
from jaxalign.models.places import Layout, gathered, scattered
from jaxalign.types import PyTree, Unembedding

REMAT = ("none", "dots", "blocks")


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with the norms of the family."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        def norm(*places: str) -> Norm | None:
            return Norm(config, config.hidden_size, compute) if config.norm_places in places else None

        self.config, self.layout = config, compute.layout
        self.attention_norm, self.attention_post_norm = norm("pre", "both"), norm("post", "both")
        self.mlp_norm, self.mlp_post_norm = norm("pre", "both"), norm("post", "both")
        self.attention = Attention(config, compute, rngs)
        self.mlp = MLP(config, compute, rngs)

    def __call__(self, x: jax.Array, coordinates: Coordinates, kind: jax.Array) -> jax.Array:
        query, key, value = self.attention.project(self._gathered(_maybe(self.attention_norm, x)))
        attend = [
            functools.partial(self._attend, coordinates=coordinates, kind=layer_kind)
            for layer_kind in self.config.kinds
        ]
        mixed = attend[0](query, key, value) if len(attend) == 1 else jax.lax.switch(kind, attend, query, key, value)
        return self._add(x, self._scattered(mixed))

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, coordinates: Coordinates, kind: LayerKind
    ) -> jax.Array:
        positions = coordinates.positions
        query, key = rotate(query, positions, kind.rope), rotate(key, positions, kind.rope)
        return self.attention.attend(query, key, value, coordinates, kind)

    def with_cache(
        self, x: jax.Array, coordinates: Coordinates, kind: LayerKind, cache: LayerCache, index: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """(output, filled cache) of tokens that also see the cached ones, and fill the slots from `index` on."""
        query, key, value = self.attention.project(self._gathered(_maybe(self.attention_norm, x)))
        positions = coordinates.positions
        query, key = rotate(query, positions, kind.rope), rotate(key, positions, kind.rope)
        cache = cache.write(index, key, value)
        mixed = self.attention.attend_cached(query, *cache.read(query.dtype), coordinates, kind)
        return self._add(x, self._scattered(mixed)), cache

    def _add(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        mixed = _maybe(self.attention_post_norm, mixed)
        if self.config.parallel:
            return x + mixed + self._mlp(x)
        x = x + mixed
        return x + _maybe(self.mlp_post_norm, self._mlp(x))

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self._scattered(self.mlp(self._gathered(_maybe(self.mlp_norm, x))))

    # Norms and sums see a chip's share of the tokens, products all tokens and a share of the width.
    def _gathered(self, x: jax.Array) -> jax.Array:
        return x if self.layout is None else gathered(self.layout, x)

    def _scattered(self, x: jax.Array) -> jax.Array:
        return x if self.layout is None else scattered(self.layout, x)


def _maybe(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Token ids in, hidden states after the final norm out."""

    def __init__(self, config: ModelConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):  # noqa: B008
        self.config, self.compute = config, compute
        std, width = config.initializer_range, config.hidden_size

        def table(size: int) -> Embedding | None:
            return Embedding(size, width, std=std, compute=compute, rngs=rngs) if size else None

        def block(key: jax.Array) -> Block:
            return Block(config, compute, nnx.Rngs(params=key))

        self.embed = table(config.vocab_size)
        self.embed_positions = table(config.learned_positions)
        keys = jax.random.split(rngs.params(), config.num_layers)
        stacked = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(block(key))))(keys)
        self.blocks = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: block(keys[0]))), stacked)
        self.norm = Norm(config, width, compute)
        self.unembedding = table(0 if config.tied else config.vocab_size)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        layers: Sequence[Block] | None = None,
        prefix_ids: jax.Array | None = None,
    ) -> Any:
        """Hidden states [B T D] in the dtype of compute; with a cache, (hidden states, the filled cache).

        Args:
          tokens: Int32[B T].
          positions: Int32[B T]; by default 0, 1, 2, ... from the start of each run of equal segment ids.
          segment_ids: Int32[B T]; by default all one segment.
          cache: the tokens read before, to which these T are added; it requires `positions`.
          layers: `self.layers()`, read with a cache only; a loop over tokens takes them once, before it starts.
          prefix_ids: Int32[B T], the segment that each token sees besides its own, such as a shared prompt.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            if cache is not None:
                raise Mistake("with a cache the positions of the new tokens must be given")
            positions = positions_in(segment_ids)
        x = self.embed(tokens, on_mesh=cache is None)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions, on_mesh=cache is None)
        if cache is None:
            coordinates = Coordinates(positions, segment_ids, positions, segment_ids, prefix_ids)
            hidden, layout = self.norm(self._run_blocks(x, coordinates)), self.compute.layout
            return hidden if layout is None else gathered(layout, hidden)
        cache = cache.place(positions, segment_ids)
        coordinates = Coordinates(positions, segment_ids, cache.positions, cache.segment_ids, prefix_ids)
        x, filled = self._run_with_cache(x, coordinates, cache, self.layers() if layers is None else layers)
        return self.norm(x), dataclasses.replace(cache, layers=filled, index=cache.index + tokens.shape[1])

    def layers(self, params: Sequence[PyTree] | None = None) -> tuple[Block, ...]:
        """The blocks one by one, for calls with a cache; `params` are `layer_params`, if they were taken before."""
        graphdef, state = nnx.split(self.blocks)
        params = layer_params({"blocks": nnx.to_pure_dict(state)}) if params is None else params
        return tuple(nnx.merge(graphdef, layer) for layer in params)

    def _run_with_cache(
        self, x: jax.Array, coordinates: Coordinates, cache: Cache, layers: Sequence[Block]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        filled = []
        for block, kind, layer_cache in zip(layers, self.config.layer_kinds, cache.layers, strict=True):
            if self.compute.layout is not None:
                x = self.compute.layout.cut(x)
            x, layer_cache = block.with_cache(x, coordinates, self.config.kinds[kind], layer_cache, cache.index)
            filled.append(layer_cache)
        return x, tuple(filled)

    def _run_blocks(self, x: jax.Array, coordinates: Coordinates) -> jax.Array:
        graphdef, state = nnx.split(self.blocks)
        layout = self.compute.layout

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, kind = layer
            if layout is not None:
                x = layout.cut(x)
            return nnx.merge(graphdef, params)(x, coordinates, kind), None

        layers = nnx.to_pure_dict(state), jnp.asarray(self.config.layer_kinds, jnp.int32)
        return jax.lax.scan(_rematerialised(body, self.compute.remat), x, layers)[0]

    def unembed(self) -> Unembedding:
        """The map from hidden states to logits, in the parameters' own dtype."""
        table = self.embed if self.unembedding is None else self.unembedding
        return Unembedding(table.embedding[...], None, self.config.final_softcap)


def layer_params(params: PyTree) -> tuple[PyTree, ...]:
    """The parameters of each block, copied out of the stack."""
    leaves, structure = jax.tree.flatten(params["blocks"])
    return tuple(jax.tree.unflatten(structure, [leaf[number] for leaf in leaves]) for number in range(len(leaves[0])))


def positions_in(segment_ids: jax.Array) -> jax.Array:
    """Int32[B T], the distance of each token from the first of its run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _rematerialised(body: Any, policy: str) -> Any:
    if policy == "none":
        return body
    # prevent_cse keeps XLA from undoing the recomputation, which cannot happen inside a scan
    if policy == "dots":
        return jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.checkpoint(body, prevent_cse=False)


def make_decoder(
    config: ModelConfig,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str | None = None,
    layout: Any = None,
    lora: Lora | None = None,
    quantise: str = "none",
) -> tuple[Any, PyTree]:
    """(graphdef, abstract params): the structure, and a nested dict of shapes and dtypes. No array is made.

    Args:
      compute_dtype: dtype of activations; parameters are cast to it as they are used.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again: "none", "dots" (all but matrix products), "blocks"
        (all).
      attention: an implementation of `models/decoder/attention.py`, or None for the best on the platform.
      layout: the mesh that cuts activations, or None for one device.
      lora: adapters of the blocks' layers, or None.
      quantise: format of the blocks' kernels: "none", "int8" or "nf4".
    """
    if remat not in REMAT:
        raise Mistake(f"remat={remat!r} is not one of {', '.join(REMAT)}")
    if attention not in (None, *IMPLEMENTATIONS):
        raise Mistake(f"attention={attention!r} is not one of {', '.join(IMPLEMENTATIONS)}, or None for the best")
    compute = Compute(jnp.dtype(compute_dtype), jnp.dtype(param_dtype), remat, attention, layout)
    decoder = nnx.eval_shape(lambda: Decoder(config, compute=compute, rngs=nnx.Rngs(0)))
    if quantise != "none":
        quantise_layers(decoder.blocks, quantise)
    if lora is not None:
        attach(decoder.blocks, lora)
    graphdef, state = nnx.split(decoder)
    return graphdef, nnx.to_pure_dict(state)


def decoder_for(config: TrainConfig, model: ModelConfig, mesh: Mesh, lora: Lora | None = None) -> tuple[Any, PyTree]:
    """`make_decoder` with the settings of a run."""
    return make_decoder(
        model,
        compute_dtype=compute_dtype(config.precision),
        param_dtype=config.param_dtype,
        remat=config.remat,
        attention=None if config.attention == "auto" else config.attention,
        layout=Layout(mesh) if mesh.size > 1 else None,
        lora=lora,
        quantise=config.lora.quantise,
    )


def compute_dtype(precision: str) -> jnp.dtype:
    """Dtype of computation; "auto" is float32 on CPU, and bfloat16 on TPU and GPU, whose matrix units expect it."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def init_params(
    config: ModelConfig, key: jax.Array, *, param_dtype: Any = jnp.float32, shardings: Any = None
) -> PyTree:
    """Random parameters, made on the devices that `shardings` (a tree like params) names."""
    compute = Compute(param_dtype=jnp.dtype(param_dtype))

    def make(key: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(Decoder(config, compute=compute, rngs=nnx.Rngs(params=key))))

    return jax.jit(make, out_shardings=shardings)(key)
