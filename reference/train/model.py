"""The reference's model on a batch, for training: the same ops, arranged for a GPU.

What differs from `reference.model` is the arrangement only, which `tests/reference/test_train.py`
holds to it: sequences are a batch axis, the window is attended in blocks of 128 instead of under a
full mask, the experts of a layer are stacked and all run at once. Beside the logits come what the
losses need: the indexer's divergence from the attention it replaces and the load of the experts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from reference import (
    compressor,
    formats,
    indexer,
    linear,
    mhc_head,
    mhc_post,
    mhc_pre,
    moe,
    output_projection,
    rmsnorm,
    rope,
    router,
    visibility,
)
from reference.attention import key_quant
from reference.model import compressor_params
from reference.rounding import OFFICIAL, Rounding, bf
from reference.train.config import kind

Weights = dict[str, jax.Array]
Config = dict[str, Any]
BLOCK = 128

# What the presets of dsv4_jax do to activations, on tensor cores.
PLAIN = Rounding(bf16=True, bf16_products=True)
TRAINED = dataclasses.replace(OFFICIAL, bf16_scores=False, bf16_products=True)
NVFP4 = dataclasses.replace(TRAINED, linear_nvfp4=True, expert_nvfp4=True)


class Aux(NamedTuple):
    """What a forward pass leaves besides logits.

    Attributes:
        index_kl: Divergence of the indexers from their layers' attention, mean over queries.
        load: Part of the picks that each expert got, `[layers, experts]`, the MTP module last.
    """

    index_kl: jax.Array
    load: jax.Array


def quantized(weights: Weights, config: Config, preset: str) -> Weights:
    """The values that a preset multiplies with, differentiable straight through.

    `"master"`: as they are. `"bf16"`: every matrix rounded to BF16. `"official"`: through the
    formats of the release. `"nvfp4"`: FP8 linears through NVFP4 after that, as `dsv4_jax`
    requantises at load (experts go over without loss).
    """
    if preset == "master":
        return weights
    out: Weights = {}
    for name, w in weights.items():
        stored = kind(config, name)
        if stored in ("f32", "i64"):
            out[name] = w
        elif preset == "bf16" or stored == "bf16":
            out[name] = bf(w)
        elif stored == "mxfp4":
            out[name] = formats.q4(w, 32)
        else:
            out[name] = formats.weight_q8(w)
            if preset == "nvfp4" and name not in ("mtp.0.e_proj.weight", "mtp.0.h_proj.weight"):
                out[name] = formats.nvfp4(out[name], formats.nvfp4_weight_scale(out[name]))
    return out


def _banded_attention(
    q: jax.Array,
    keys: jax.Array,
    entries: jax.Array,
    visible: jax.Array,
    sink: jax.Array,
    window: int,
    rounding: Rounding,
) -> tuple[jax.Array, jax.Array]:
    """`masked_attention` of one sequence over its window and its compressed entries.

    Args:
        q: `[t, h, d]`, `t` a multiple of 128.
        keys: `[t, d]`.
        entries: `[n, d]`.
        visible: `[t, n]`.
        sink: `[h]`.
        window: Positions of the window, at most 128.
        rounding: Rounding points.

    Returns:
        `[t, h, d]` and the weight of each entry summed over heads, `[t, n]`, up to a factor.
    """
    t, h, d = q.shape
    blocks, n = t // BLOCK, len(entries)
    before = jnp.concatenate([jnp.zeros((BLOCK, d), keys.dtype), keys[:-BLOCK]])
    pairs = jnp.concatenate(
        [before.reshape(blocks, BLOCK, d), keys.reshape(blocks, BLOCK, d)], axis=1
    )
    query = jnp.arange(BLOCK)[:, None] + BLOCK
    key = jnp.arange(2 * BLOCK)[None, :]
    band = (key <= query) & (key > query - window)  # [128, 256]
    real = (jnp.arange(blocks)[:, None] > 0) | (key >= BLOCK)  # [blocks, 256]
    mask = band[None] & real[:, None]
    qb = q.reshape(blocks, BLOCK, h, d)
    scale = d**-0.5
    near = rounding.einsum("bqhd,bkd->bqhk", qb, pairs) * scale
    near = jnp.where(mask[:, :, None, :], near, -jnp.inf)
    far = rounding.einsum("thd,nd->thn", q, entries) * scale
    far = jnp.where(visible[:, None, :], far, -jnp.inf).reshape(blocks, BLOCK, h, n)
    top = lax.stop_gradient(jnp.max(near, axis=-1, keepdims=True))
    if n:
        top = lax.stop_gradient(jnp.maximum(top, jnp.max(far, axis=-1, keepdims=True)))
    near, far = jnp.exp(near - top), jnp.exp(far - top)
    denominator = near.sum(-1, keepdims=True) + far.sum(-1, keepdims=True)
    denominator = denominator + jnp.exp(sink[:, None] - top)
    weight = (far / denominator).sum(axis=2).reshape(t, n)
    if rounding.bf16_probs:
        near, far = bf(near), bf(far)
    o = rounding.einsum("bqhk,bkd->bqhd", near, pairs).reshape(t, h, d)
    if n:
        o = o + rounding.einsum("thn,nd->thd", far.reshape(t, h, n), entries)
    return rounding.bf(o / denominator.reshape(t, h, 1)), weight


def _index_scores(
    p: Weights, config: Config, x: jax.Array, qr: jax.Array, freqs: jax.Array, rounding: Rounding
) -> jax.Array:
    """Index scores of one sequence, `[t, n]`; the layer itself gets no gradient from them."""
    t, heads, width = len(x), config["index_n_heads"], config["index_head_dim"]
    x, qr = lax.stop_gradient(x), lax.stop_gradient(qr)
    q = linear.lin8(qr, p["attn.indexer.wq_b.weight"], rounding).reshape(t, heads, width)
    q = rope.rope_tail(q, jnp.arange(t)[:, None], freqs, rounding=rounding)
    weight = linear.linear(x, p["attn.indexer.weights_proj.weight"], rounding)
    weight = rounding.bf(weight * (width**-0.5 * heads**-0.5))
    entries = compressor.entries(
        x,
        compressor_params(p, "attn.indexer.compressor."),
        4,
        width,
        freqs,
        config["rms_norm_eps"],
        rounding,
    )
    q, entries = (indexer.index_quant(y, rounding) for y in (q, entries))
    return indexer.indexer(q, entries, weight, rounding)


def _selected(scores: jax.Array, visible: jax.Array, k: int) -> jax.Array:
    """The `k` best visible entries, the lowest index first on ties (`indexer.topk_visible`)."""
    if scores.shape[1] <= k:
        return visible
    scores = lax.stop_gradient(jnp.where(visible, scores, -jnp.inf))
    last = lax.top_k(scores, k)[0][:, -1:]
    above, tied = scores > last, scores == last
    room = k - above.sum(axis=1, keepdims=True)
    return visible & (above | (tied & (jnp.cumsum(tied, axis=1) <= room)))


def _index_kl(scores: jax.Array, weight: jax.Array, attended: jax.Array) -> jax.Array:
    """KL(attention || softmax of the index scores) over the attended entries, mean over queries.

    The target is the weight of each entry summed over the heads and normalised, a constant.
    """
    weight = lax.stop_gradient(weight)
    total = weight.sum(-1, keepdims=True)
    target = weight / jnp.maximum(total, 1e-20)
    log_index = jax.nn.log_softmax(jnp.where(attended, scores, -1e30), axis=-1)
    log_target = jnp.log(jnp.maximum(target, 1e-20))
    kl = jnp.sum(jnp.where(attended, target * (log_target - log_index), 0), axis=-1)
    return jnp.mean(jnp.where(total[:, 0] > 0, kl, 0))


def _attention(
    p: Weights, config: Config, m: int, x: jax.Array, sparse: jax.Array, rounding: Rounding
) -> tuple[jax.Array, jax.Array]:
    """Attention branch, `x [b, t, dim]` -> `[b, t, dim]`, and the indexer's divergence."""
    b, t, dim = x.shape
    d, heads, eps = config["head_dim"], config["num_attention_heads"], config["rms_norm_eps"]
    positions = jnp.tile(jnp.arange(t), b)
    freqs = jnp.asarray(rope.rope_frequencies("compress" if m else "main", config))
    flat = x.reshape(b * t, dim)
    qr = rmsnorm.rmsnorm(
        linear.lin8(flat, p["attn.wq_a.weight"], rounding), p["attn.q_norm.weight"], eps, rounding
    )
    q = linear.lin8(qr, p["attn.wq_b.weight"], rounding).reshape(b * t, heads, d)
    q = rmsnorm.head_norm(q, eps, rounding)
    q = rope.rope_tail(q, positions[:, None], freqs, rounding=rounding)
    keys = rmsnorm.rmsnorm(
        linear.lin8(flat, p["attn.wkv.weight"], rounding), p["attn.kv_norm.weight"], eps, rounding
    )
    keys = rope.rope_tail(keys, positions, freqs, rounding=rounding)
    keys = key_quant(keys, config["qk_rope_head_dim"], rounding)

    def sequence(x, qr, q, keys):
        n = t // m if m else 0
        entries, visible = jnp.zeros((0, d)), jnp.zeros((t, 0), bool)
        scores = None
        if m:
            entries = compressor.entries(
                x, compressor_params(p, "attn.compressor."), m, d, freqs, eps, rounding
            )
            entries = key_quant(entries, config["qk_rope_head_dim"], rounding)
            visible = visibility.entries(t, n, m)
        if m == 4:
            scores = _index_scores(p, config, x, qr, freqs, rounding)
            picked = _selected(scores, visible, config["index_topk"])
            visible = jnp.where(sparse, picked, visible)
        o, weight = _banded_attention(
            q, keys, entries, visible, p["attn.attn_sink"], config["sliding_window"], rounding
        )
        return o, jnp.float32(0) if scores is None else _index_kl(scores, weight, visible)

    o, kl = jax.vmap(sequence)(
        x, qr.reshape(b, t, -1), q.reshape(b, t, heads, d), keys.reshape(b, t, d)
    )
    o = o.reshape(b * t, heads, d)
    o = rope.rope_tail(o, positions[:, None], freqs, inverse=True, rounding=rounding)
    wo_a, wo_b = p["attn.wo_a.weight"], p["attn.wo_b.weight"]
    out = output_projection.output_projection(o, wo_a, wo_b, config["o_groups"], rounding)
    return out.reshape(b, t, dim), jnp.mean(kl)


def _act(x: jax.Array, nvfp4: bool, rounding: Rounding) -> jax.Array:
    """The input of a routed expert's linear (`reference.linear.lin4`)."""
    if nvfp4:
        return formats.nvfp4(x, formats.nvfp4_token_scale(x))
    return formats.q8(x, 128) if rounding.act_fp8 else x


def _moe(
    p: Weights, config: Config, x: jax.Array, tokens: jax.Array, rounding: Rounding
) -> tuple[jax.Array, jax.Array]:
    """MoE branch on `x [t, dim]` and the load of the experts `[e]`."""
    experts, k = config["n_routed_experts"], config["num_experts_per_tok"]
    hashed = p["ffn.gate.tid2eid"][tokens] if "ffn.gate.tid2eid" in p else None
    idx, weight = router.router(
        x,
        p["ffn.gate.weight"],
        None if hashed is not None else lax.stop_gradient(p["ffn.gate.bias"]),
        hashed,
        k,
        config["routed_scaling_factor"],
    )
    picks = jax.nn.one_hot(idx, experts)  # [t, k, e]
    dense = jnp.sum(picks * weight[:, :, None], axis=1)
    load = lax.stop_gradient(picks.mean(axis=(0, 1)))
    w1, w2, w3 = (p[f"ffn.experts.{w}"] for w in ("w1", "w2", "w3"))
    act = _act(x, rounding.expert_nvfp4, rounding)
    gate = rounding.bf(rounding.einsum("td,eid->tei", act, w1))
    up = rounding.bf(rounding.einsum("td,eid->tei", act, w3))
    h = rounding.bf(dense[:, :, None] * moe.swiglu(gate, up, config["swiglu_limit"]))
    routed = rounding.einsum("tei,edi->td", _act(h, rounding.expert_nvfp4, rounding), w2)
    s1, s2, s3 = (p[f"ffn.shared_experts.{w}.weight"] for w in ("w1", "w2", "w3"))
    shared = moe.shared_expert(x, s1, s2, s3, config["swiglu_limit"], rounding)
    return rounding.bf(routed + shared), load


def _sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """`reference.mhc_pre.sinkhorn` of `[t, hc, hc]` as a loop, tokens on the last axis."""

    def total(c: jax.Array, axis: int) -> jax.Array:
        parts = [lax.index_in_dim(c, i, axis) for i in range(c.shape[axis])]
        return functools.reduce(jnp.add, parts) + eps

    def turn(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = c / total(c, 1)
        return c / total(c, 0), None

    c = jnp.moveaxis(jax.nn.softmax(logits, axis=-1) + eps, 0, -1)
    c, _ = lax.scan(turn, c / total(c, 0), length=iters - 1)
    return jnp.moveaxis(c, -1, 0)


def _mhc_pre(
    streams: jax.Array, p: Weights, config: Config, rounding: Rounding
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`reference.mhc_pre.mhc_pre` with the parameters `fn`, `base`, `scale` of one branch."""
    t, hc, _ = streams.shape
    base, scale, eps = p["base"], p["scale"], config["hc_eps"]
    mix = mhc_pre.mhc_mix(streams, p["fn"], config["rms_norm_eps"])
    pre = jax.nn.sigmoid(mix[:, :hc] * scale[0] + base[:hc]) + eps
    post = 2 * jax.nn.sigmoid(mix[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    logits = (mix[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(t, hc, hc)
    comb = _sinkhorn(logits, config["hc_sinkhorn_iters"], eps)
    return rounding.bf(jnp.sum(pre[:, :, None] * streams, axis=1)), post, comb


def _drop(x: jax.Array, rate: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def layer(
    p: Weights,
    config: Config,
    m: int,
    streams: jax.Array,
    tokens: jax.Array,
    sparse: jax.Array,
    rounding: Rounding,
    dropout: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer on `streams [b, t, hc, dim]`; also the indexer's divergence and the load."""
    b, t, hc, dim = streams.shape
    eps = config["rms_norm_eps"]
    keys = (None, None) if key is None else jax.random.split(key)
    s = streams.reshape(b * t, hc, dim)
    read = _mhc_pre(s, part(p, "hc_attn_"), config, rounding)
    x = rmsnorm.rmsnorm(read[0], p["attn_norm.weight"], eps, rounding)
    f, kl = _attention(p, config, m, x.reshape(b, t, dim), sparse, rounding)
    f = _drop(f.reshape(b * t, dim), dropout, keys[0])
    s = mhc_post.mhc_post(f, s, read[1], read[2], rounding)
    read = _mhc_pre(s, part(p, "hc_ffn_"), config, rounding)
    x = rmsnorm.rmsnorm(read[0], p["ffn_norm.weight"], eps, rounding)
    f, load = _moe(p, config, x, tokens.reshape(-1), rounding)
    f = _drop(f, dropout, keys[1])
    s = mhc_post.mhc_post(f, s, read[1], read[2], rounding)
    return s.reshape(b, t, hc, dim), kl, load


def part(weights: Weights, prefix: str) -> Weights:
    """The tensors under a prefix, without it."""
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def _head(
    weights: Weights, config: Config, streams: jax.Array, prefix: str, rounding: Rounding
) -> jax.Array:
    b, t, hc, dim = streams.shape
    collapse = (weights[prefix + name] for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"))
    eps = config["rms_norm_eps"]
    s = streams.reshape(b * t, hc, dim)
    h = mhc_head.mhc_head(s, *collapse, hc_eps=config["hc_eps"], rms_eps=eps, rounding=rounding)
    h = rmsnorm.rmsnorm(h, weights[prefix + "norm.weight"], eps, rounding)
    return linear.product(h, weights["head.weight"], rounding).reshape(b, t, -1)


def forward(
    weights: Weights,
    config: Config,
    tokens: jax.Array,
    rounding: Rounding,
    *,
    sparse: jax.Array | bool = True,
    dropout: jax.Array | float = 0.0,
    key: jax.Array | None = None,
    next_tokens: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array | None, Aux]:
    """Logits of every position of a batch.

    Args:
        weights: Names as `reference.train.config.shapes`; matrices through `quantized`.
        config: Official config.
        tokens: `[b, t]` at positions `0 ... t - 1`, `t` a multiple of 128.
        rounding: Rounding points.
        sparse: Whether ratio-4 layers attend to the indexer's picks, or to every entry.
        dropout: Rate on the branch outputs, with `key`.
        key: `None` for inference.
        next_tokens: `[b, t]`; with them the MTP module runs, too.
        remat: Recompute every layer in the backward pass.

    Returns:
        Logits `[b, t, V]`, those of the MTP module (or None), and the rest.
    """
    sparse, dropout = jnp.asarray(sparse), jnp.asarray(dropout, jnp.float32)
    keys = [None] * (config["num_hidden_layers"] + 1)
    if key is not None:
        keys = list(jax.random.split(key, len(keys)))

    def run(m: int, rounding: Rounding, p, streams, tokens, key):
        return layer(p, config, m, streams, tokens, sparse, rounding, dropout, key)

    run = jax.checkpoint(run, static_argnums=(0, 1)) if remat else run
    rows = rounding.bf(weights["embed.weight"])[tokens]
    s = jnp.repeat(rows[:, :, None, :], config["hc_mult"], axis=2)
    kls, loads = [], []
    for i in range(config["num_hidden_layers"]):
        m = config["compress_ratios"][i]
        s, kl, load = run(m, rounding, part(weights, f"layers.{i}."), s, tokens, keys[i])
        kls.append(kl)
        loads.append(load)
    logits = _head(weights, config, s, "", rounding)
    drafted = None
    if next_tokens is not None:
        p, eps = part(weights, "mtp.0."), config["rms_norm_eps"]
        row = rounding.bf(weights["embed.weight"])[next_tokens]
        e = rmsnorm.rmsnorm(row, p["enorm.weight"], eps, rounding)
        mtp = dataclasses.replace(rounding, linear_nvfp4=False, expert_nvfp4=False)
        e = linear.lin8(e, p["e_proj.weight"], mtp)
        h = rmsnorm.rmsnorm(s, p["hnorm.weight"], eps, rounding)
        h = linear.lin8(h, p["h_proj.weight"], mtp)
        s0 = rounding.bf(e[:, :, None, :] + h)
        experts = dataclasses.replace(rounding, expert_nvfp4=False)  # the preset's `mtp_experts`
        s1, _, load = run(0, experts, p, s0, next_tokens, keys[-1])
        loads.append(load)
        drafted = _head(weights, config, s1, "mtp.0.", rounding)
    return logits, drafted, Aux(sum(kls, jnp.float32(0)), jnp.stack(loads))
