"""One decoder for every family: its blocks are stacked on a layer axis and run by one scan.

    graphdef, abstract_params = make_decoder(config)
    params = init_params(config, key)          # or models/files/huggingface.py: load_params
    model = nnx.merge(graphdef, params)        # first line of a pure function
    hidden = model(tokens, positions=positions, segment_ids=segment_ids)

Training's compile time does not grow with depth; a call with a cache runs the layers one by one, each with a cache of
its own. Initial weights are normal with the config's initializer_range; what writes to
the residual stream starts smaller by sqrt(2 L) (GPT-2). Dropout is not applied: this is a model for alignment, whose
policies and references must agree.
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
from jaxalign.models.decoder.attention import IMPLEMENTATIONS
from jaxalign.models.decoder.cache import Cache, LayerCache
from jaxalign.models.decoder.config import LayerKind, ModelConfig
from jaxalign.models.decoder.layers import MLP, Attention, Compute, Embedding, Norm, Where, rotate
from jaxalign.models.places import Layout
from jaxalign.types import PyTree, Unembedding

REMAT = ("none", "dots", "blocks")


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms where the family has them."""

    def __init__(self, config: ModelConfig, compute: Compute, rngs: nnx.Rngs):
        before, after = config.norm_places in ("pre", "both"), config.norm_places in ("post", "both")
        norm = lambda present: Norm(config, config.hidden_size, compute) if present else None  # noqa: E731
        self.config = config
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)
        self.attention = Attention(config, compute, rngs)
        self.mlp = MLP(config, compute, rngs)

    def __call__(self, x: jax.Array, where: Where, kind: jax.Array) -> jax.Array:
        query, key, value = self.attention.project(_maybe(self.attention_norm, x))
        attend = [functools.partial(self._attend, where=where, kind=each) for each in self.config.kinds]
        mixed = attend[0](query, key, value) if len(attend) == 1 else jax.lax.switch(kind, attend, query, key, value)
        return self._add(x, mixed)

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, where: Where, kind: LayerKind) -> jax.Array:
        query, key = rotate(query, where.positions, kind.rope), rotate(key, where.positions, kind.rope)
        return self.attention.attend(query, key, value, where, kind)

    def remembering(
        self, x: jax.Array, where: Where, kind: LayerKind, held: LayerCache, index: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """The same of tokens that also see what the cache holds, which they join from slot `index` on."""
        query, key, value = self.attention.project(_maybe(self.attention_norm, x))
        query, key = rotate(query, where.positions, kind.rope), rotate(key, where.positions, kind.rope)
        held = held.write(index, key, value)
        return self._add(x, self.attention.attend_held(query, *held.read(query.dtype), where, kind)), held

    def _add(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        mixed = _maybe(self.attention_post_norm, mixed)
        if self.config.parallel:
            return x + mixed + self.mlp(_maybe(self.mlp_norm, x))
        x = x + mixed
        return x + _maybe(self.mlp_post_norm, self.mlp(_maybe(self.mlp_norm, x)))


def _maybe(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """Token ids in, hidden states after the final norm out."""

    def __init__(self, config: ModelConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):  # noqa: B008
        self.config, self.compute = config, compute
        std, width = config.initializer_range, config.hidden_size
        table = lambda size: Embedding(size, width, std=std, compute=compute, rngs=rngs) if size else None  # noqa: E731
        self.embed = table(config.vocab_size)
        self.embed_positions = table(config.learned_positions)
        keys = jax.random.split(rngs.params(), config.num_layers)
        make = lambda key: Block(config, compute, nnx.Rngs(params=key))  # noqa: E731
        stacked = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(keys)
        self.blocks = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(keys[0]))), stacked)
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
          cache: what was read before; the T tokens are added to it, and their positions must be given.
          layers: `self.layers()`, with a cache; a loop over tokens takes them before it starts.
          prefix_ids: Int32[B T], the segment that each token sees besides its own, as a shared prompt.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            if cache is not None:
                raise Mistake("with a cache the positions of the new tokens must be given")
            positions = positions_in(segment_ids)
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        if cache is None:
            where = Where(positions, segment_ids, positions, segment_ids, prefix_ids)
            return self.norm(self._run_blocks(x, where))
        cache = cache.place(positions, segment_ids)
        where = Where(positions, segment_ids, cache.positions, cache.segment_ids, prefix_ids)
        x, held = self._run_remembering(x, where, cache, self.layers() if layers is None else layers)
        return self.norm(x), dataclasses.replace(cache, layers=held, index=cache.index + tokens.shape[1])

    def layers(self, params: Sequence[PyTree] | None = None) -> tuple[Block, ...]:
        """The blocks one by one, for calls with a cache; of `layer_params`, if they were taken before."""
        graphdef, state = nnx.split(self.blocks)
        held = layer_params({"blocks": nnx.to_pure_dict(state)}) if params is None else params
        return tuple(nnx.merge(graphdef, layer) for layer in held)

    def _run_remembering(
        self, x: jax.Array, where: Where, cache: Cache, layers: Sequence[Block]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        found = []
        for block, kind, held in zip(layers, self.config.layer_kinds, cache.layers, strict=True):
            if self.compute.layout is not None:
                x = self.compute.layout.constrain_hidden(x)
            x, held = block.remembering(x, where, self.config.kinds[kind], held, cache.index)
            found.append(held)
        return x, tuple(found)

    def _run_blocks(self, x: jax.Array, where: Where) -> jax.Array:
        graphdef, state = nnx.split(self.blocks)
        layout = self.compute.layout

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, kind = layer
            if layout is not None:
                x = layout.constrain_hidden(x)
            return nnx.merge(graphdef, params)(x, where, kind), None

        layers = nnx.to_pure_dict(state), jnp.asarray(self.config.layer_kinds, jnp.int32)
        return jax.lax.scan(_rematerialised(body, self.compute.remat), x, layers)[0]

    def unembed(self) -> Unembedding:
        """From hidden states to logits, in the parameters' own dtype."""
        table = self.embed if self.unembedding is None else self.unembedding
        return Unembedding(table.embedding[...], None, self.config.final_softcap)


def layer_params(params: PyTree) -> tuple[PyTree, ...]:
    """The parameters of each block, taken out of the stack: a copy."""
    count = len(jax.tree.leaves(params["blocks"])[0])
    take = lambda number: jax.tree.map(lambda leaf: leaf[number], params["blocks"])  # noqa: E731
    return tuple(take(number) for number in range(count))


def positions_in(segment_ids: jax.Array) -> jax.Array:
    """Int32[B T]: how far each token is from the first of its run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _rematerialised(body: Any, policy: str) -> Any:
    if policy == "none":
        return body
    # prevent_cse guards against undoing the recomputation, which a scan does not need
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
      compute_dtype: of activations; parameters are cast to it where they are used.
      param_dtype: of the parameters.
      remat: what the backward pass computes again: "none", "dots" (all but matrix products), "blocks" (all).
      attention: an implementation of `models/decoder/attention.py`, or None for the best on the platform.
      layout: the mesh that cuts activations, or None for one device.
      lora: adapters that the blocks carry, or None.
      quantise: of the blocks' kernels: "none", "int8" or "nf4".
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
        attach(decoder.blocks, lora, compute.dtype)
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
    """Dtype of computation; "auto" is bfloat16 on TPU and GPU, whose matrix units want it, and float32 on CPU."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def init_params(
    config: ModelConfig, key: jax.Array, *, param_dtype: Any = jnp.float32, shardings: Any = None
) -> PyTree:
    """Random parameters, made in place on the devices that `shardings` (a tree like params) names."""
    compute = Compute(param_dtype=jnp.dtype(param_dtype))

    def make(key: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(Decoder(config, compute=compute, rngs=nnx.Rngs(params=key))))

    return jax.jit(make, out_shardings=shardings)(key)
