"""Log-probability of chosen tokens, entropy and more, from hidden states and the unembedding, in one pass over it.

`reference` is the definition. `token_logps` is the kernel: tiles of logits are computed in fast memory, folded into an
online log-sum-exp and dropped; the backward pass computes them again. No [N, V] array exists. Tokens where the mask
is False are moved behind the others, and tiles of such tokens alone are skipped: prompts cost nothing.

With p = softmax(z), H the entropy, and g the gradients with respect to logps, log_normalizer, entropy and mean_logit,

    dz = g_logps (onehot - p) + g_log_normalizer p - g_entropy p (log p + H) + g_mean_logit / V

then through temperature and soft-cap to draw, and dhidden = draw W, dweight = drawᵀ hidden, dbias = Σ draw.

The bodies are in `logprob_tpu.py` and `logprob_gpu.py`. Online softmax: Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867, algorithm 3. The loss without logits: Wijmans et al. 2024 (Cut Cross-Entropy),
https://arxiv.org/abs/2411.09009; unlike them we skip no tile for its small probabilities: a tile can only be skipped
if they are small for all its tokens, and tiles are tall here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.kernels import logprob_gpu, logprob_tpu
from jaxalign.kernels.logprob_tile import Options, Slopes, Statistics, merge
from jaxalign.kernels.products import times
from jaxalign.kernels.runtime import Target, up

__all__ = ["Options", "backward", "forward", "reference", "supports", "token_logps"]


def reference(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
    """The definition: all logits at once, [N V] in float32."""
    logits = times("nd,vd->nv", hidden, weight.astype(hidden.dtype))
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, :]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits /= temperature
    all_logps = jax.nn.log_softmax(logits, axis=-1)
    return {
        "logps": jnp.take_along_axis(all_logps, targets[:, None], axis=1)[:, 0],
        "entropy": -jnp.sum(jnp.exp(all_logps) * all_logps, axis=-1),
        "log_normalizer": jax.nn.logsumexp(logits, axis=-1),
        "mean_logit": jnp.mean(logits, axis=-1),
        "correct": jnp.argmax(logits, axis=-1) == targets,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_logps(
    options: Options,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
) -> dict[str, jax.Array]:
    """logps, log_normalizer and the extras that `options` sets, of each token, in float32; 0 where the mask is False.

    Args:
      options: static: soft-cap, temperature, extras.
      target: static: the chip; see `runtime.py`.
      hidden: [N D]; products are computed in its dtype and summed in float32.
      weight: [V D].
      bias: [V] or None.
      targets: Int32[N] in [0, V); outside, the log-probability is NaN.
      mask: Bool[N].
    """
    return forward(options, target, hidden, weight, bias, targets, mask)[0]


def _forward(options, target, hidden, weight, bias, targets, mask):
    values, saved = forward(options, target, hidden, weight, bias, targets, mask)
    return values, (hidden, weight, bias, targets, mask, saved)


def _backward(options, target, residuals, gradients):
    *inputs, saved = residuals
    return *backward(options, target, *inputs, saved, gradients), None, None


token_logps.defvjp(_forward, _backward)


def supports(tokens: int, vocabulary: int, width: int, itemsize: int, target: Target) -> bool:
    """True if tiles of this shape fit on this chip, forward and backward."""
    if target.body == "gpu":
        return logprob_gpu.choose_tiles(itemsize, target) is not None
    choose = functools.partial(logprob_tpu.choose_tiles, tokens, vocabulary, up(width, 128), itemsize, target)
    return target.body == "tpu" and all(choose(backward=backward) is not None for backward in (False, True))


def forward(
    options: Options,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    *,
    axis: str | None = None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """(values, residuals of `backward`); V may be cut in equal parts over the mapped axis `axis`.

    Shards exchange six numbers a token, once.
    """
    part = _prepare(target, hidden, weight, bias, targets, mask, axis, backward=False)
    run = logprob_gpu.forward if target.body == "gpu" else logprob_tpu.forward
    stats = run(*part.arrays, vocabulary=weight.shape[0], tiles=part.tiles, options=options, target=target)
    if target.body == "gpu":
        stats = merge(stats)
    stats = Statistics(*(x[part.back] for x in stats))
    stats = stats._replace(best=stats.best + part.first)
    shards = 1
    if axis is not None:
        shards = jax.lax.axis_size(axis)
        stats = merge(Statistics(*jnp.moveaxis(jax.lax.all_gather(jnp.stack(stats), axis), 1, 0)))
    vocabulary = weight.shape[0] * shards
    log_mass = jnp.log(stats.mass)
    values = {
        "logps": jnp.where((targets >= 0) & (targets < vocabulary), (stats.chosen - stats.peak) - log_mass, jnp.nan),
        "log_normalizer": stats.peak + log_mass,
    }
    if options.entropy:
        values["entropy"] = log_mass - stats.weighted / stats.mass
    if options.mean_logit:
        values["mean_logit"] = stats.total / vocabulary
    if options.correct:
        values["correct"] = stats.best.astype(jnp.int32) == targets
    values = {name: jnp.where(mask, x, jnp.zeros((), x.dtype)) for name, x in values.items()}
    return values, (values["log_normalizer"], values.get("entropy", jnp.zeros_like(log_mass)))


def backward(
    options: Options,
    target: Target,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    saved: tuple[jax.Array, jax.Array],  # residuals of `forward`
    gradients: dict[str, Any],  # of the values of `forward`; "correct" is ignored
    *,
    axis: str | None = None,
    weight_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(dhidden, dweight, dbias); of a shard of V, the contributions of its logits.

    They have the dtypes of the arguments, dweight that of `weight_dtype` if it is set: float32 for a later sum.
    """
    weight_dtype = weight.dtype if weight_dtype is None else weight_dtype
    part = _prepare(target, hidden, weight, bias, targets, mask, axis, backward=True)
    log_normalizer, entropy = saved
    vocabulary = weight.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    none = jnp.zeros_like(log_normalizer)
    g = {name: jnp.where(mask, x, 0.0) for name, x in gradients.items() if name != "correct"}
    slopes = Slopes(
        log_normalizer=log_normalizer,
        scale=-g["logps"] + g["log_normalizer"] - g.get("entropy", none) * entropy,
        entropy=g.get("entropy", none),
        logps=g["logps"],
        mean_logit=g.get("mean_logit", none) / vocabulary,
    )
    slopes = Slopes(*(part.move(x) for x in slopes))
    static = {"vocabulary": weight.shape[0], "tiles": part.tiles, "options": options, "target": target}
    if target.body == "gpu":
        d_hidden, d_weight, d_bias = logprob_gpu.backward(*part.arrays, slopes, **static, dtype=weight_dtype)
    else:
        d_hidden, d_weight, d_bias = logprob_tpu.backward(*part.arrays, slopes, **static)
    d_hidden = jnp.where(mask[:, None], d_hidden[part.back, : hidden.shape[1]], jnp.zeros((), hidden.dtype))
    d_weight = d_weight[: weight.shape[0], : weight.shape[1]].astype(weight_dtype)
    return d_hidden, d_weight, None if bias is None else d_bias[: bias.shape[0]].astype(bias.dtype)


class _Part(NamedTuple):
    """Arguments of a kernel: tokens that count in front, everything padded to whole tiles."""

    arrays: tuple  # number of tokens that count, hidden, weight, bias, targets
    tiles: logprob_tpu.Tiles | logprob_gpu.Tiles
    first: jax.Array | int  # id of the first logit of this shard
    order: jax.Array  # Int[N]: the token at each place
    back: jax.Array  # Int[N]: the place of each token
    rows: int

    def move(self, x: jax.Array) -> jax.Array:
        """[N] -> [rows], in the order of the kernel; padded with 0."""
        return jnp.pad(x[self.order], (0, self.rows - x.shape[0]))


def _prepare(target, hidden, weight, bias, targets, mask, axis, *, backward: bool) -> _Part:
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    size = hidden.dtype.itemsize
    if target.body == "gpu":
        tiles = logprob_gpu.choose_tiles(size, target)
        deep, wide = tiles.depth, tiles.columns
        if backward:
            wide = logprob_gpu.chunk_columns(up(tokens, tiles.rows), vocabulary, tiles)
    else:
        deep = 128
        tiles = logprob_tpu.choose_tiles(tokens, vocabulary, up(width, deep), size, target, backward=backward)
        wide = tiles.columns
    rows, columns, depth = up(tokens, tiles.rows), up(vocabulary, wide), up(width, deep)
    first = 0 if axis is None else jax.lax.axis_index(axis) * vocabulary
    local = targets.astype(jnp.int32) - first
    local = jnp.where((local >= 0) & (local < vocabulary), local, -1)
    order = jnp.argsort(jnp.logical_not(mask), stable=True)
    narrow = jnp.pad(weight.astype(hidden.dtype), ((0, columns - vocabulary), (0, depth - width)))
    shift = None if bias is None else jnp.pad(bias.astype(jnp.float32), (0, columns - vocabulary))
    part = _Part((), tiles, first, order, jnp.argsort(order), rows)
    moved, count = part.move(local), jnp.sum(mask, dtype=jnp.int32)[None]
    front = jnp.pad(hidden[order], ((0, rows - tokens), (0, depth - width)))
    if target.body == "tpu":
        moved, shift = moved[:, None], None if shift is None else shift[None, :]
    return part._replace(arrays=(count, front, narrow, shift, moved))
