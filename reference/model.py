"""The whole model on one sequence, all queries at once, no cache (sections 0, 2.3, 3, 5, 6).

`weights` is a flat dict of official tensor names without quantisation
(`reference.weights.dequantize_official`), one entry per expert
(`layers.3.ffn.experts.0.w1.weight`). `config` is the official `config.json` as a dict. `tokens [t]`
stand at positions `0 ... t - 1`. Layer number `num_hidden_layers` means the layer inside the MTP
module. Functions can be jitted with `config`, `layer` and `rounding` closed over.
"""

from typing import Any

import jax
import jax.numpy as jnp

from reference import (
    attention,
    compressor,
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
from reference.rounding import FP32, Rounding

Weights = dict[str, Any]
Config = dict[str, Any]


def layer_prefix(config: Config, layer: int) -> str:
    """`layers.N.`, or `mtp.0.` for the layer after the last."""
    return f"layers.{layer}." if layer < config["num_hidden_layers"] else "mtp.0."


def layer_weights(weights: Weights, config: Config, layer: int) -> Weights:
    """The tensors of one layer, prefix removed: what `layer` needs of `weights`."""
    prefix = layer_prefix(config, layer)
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def compressor_params(p: Weights, prefix: str) -> Weights:
    """What `compressor.entries` needs of the tensors of a layer."""
    names = {"wkv": "wkv.weight", "wgate": "wgate.weight", "ape": "ape", "norm": "norm.weight"}
    return {key: p[prefix + name] for key, name in names.items()}


def select_entries(
    p: Weights,
    config: Config,
    x: jax.Array,
    qr: jax.Array,
    freqs: jax.Array,
    visible: jax.Array,
    rounding: Rounding,
) -> jax.Array:
    """The compressed entries a ratio-4 layer attends to, `[t, n]` bool (section 3.5)."""
    t, heads, width = len(x), config["index_n_heads"], config["index_head_dim"]
    q = linear.lin8(qr, p["attn.indexer.wq_b.weight"], rounding).reshape(t, heads, width)
    q = indexer.index_quant(
        rope.rope_tail(q, jnp.arange(t)[:, None], freqs, rounding=rounding), rounding
    )
    weight = linear.linear(x, p["attn.indexer.weights_proj.weight"], rounding)
    weight = rounding.bf(weight * (width**-0.5 * heads**-0.5))
    params = compressor_params(p, "attn.indexer.compressor.")
    entries = compressor.entries(x, params, 4, width, freqs, config["rms_norm_eps"], rounding)
    scores = indexer.indexer(q, indexer.index_quant(entries, rounding), weight, rounding)
    return indexer.topk_visible(scores, visible, config["index_topk"])


def attention_branch(
    p: Weights, config: Config, m: int, x: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Attention of a layer with ratio `m` on its normalised input (section 3).

    `x [t, dim]` -> `[t, dim]`.
    """
    t, d, eps = len(x), config["head_dim"], config["rms_norm_eps"]
    positions = jnp.arange(t)
    freqs = jnp.asarray(rope.rope_frequencies("compress" if m else "main", config))
    qr = rmsnorm.rmsnorm(
        linear.lin8(x, p["attn.wq_a.weight"], rounding), p["attn.q_norm.weight"], eps, rounding
    )
    q = linear.lin8(qr, p["attn.wq_b.weight"], rounding).reshape(t, -1, d)
    q = rmsnorm.head_norm(q, eps, rounding)
    q = rope.rope_tail(q, positions[:, None], freqs, rounding=rounding)
    keys = rmsnorm.rmsnorm(
        linear.lin8(x, p["attn.wkv.weight"], rounding), p["attn.kv_norm.weight"], eps, rounding
    )
    keys = rope.rope_tail(keys, positions, freqs, rounding=rounding)
    mask = visibility.window(t, config["sliding_window"])
    if m:
        params = compressor_params(p, "attn.compressor.")
        entries = compressor.entries(x, params, m, d, freqs, eps, rounding)
        visible = visibility.entries(t, len(entries), m)
        if m == 4:
            visible = select_entries(p, config, x, qr, freqs, visible, rounding)
        keys, mask = jnp.concatenate([keys, entries]), jnp.concatenate([mask, visible], axis=1)
    keys = attention.key_quant(keys, config["qk_rope_head_dim"], rounding)
    o = attention.masked_attention(q, keys, p["attn.attn_sink"], mask, rounding)
    o = rope.rope_tail(o, positions[:, None], freqs, inverse=True, rounding=rounding)
    wo_a, wo_b = p["attn.wo_a.weight"], p["attn.wo_b.weight"]
    return output_projection.output_projection(o, wo_a, wo_b, config["o_groups"], rounding)


def moe_branch(
    p: Weights, config: Config, x: jax.Array, tokens: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Mixture of experts on the normalised input (section 5).

    `x [t, dim]`, `tokens [t]` -> `[t, dim]`.
    """
    hashed = p["ffn.gate.tid2eid"][tokens] if "ffn.gate.tid2eid" in p else None
    expert_idx, expert_weight = router.router(
        x,
        p["ffn.gate.weight"],
        p.get("ffn.gate.bias"),
        hashed,
        config["num_experts_per_tok"],
        config["routed_scaling_factor"],
    )
    w1, w2, w3 = (
        jnp.stack([p[f"ffn.experts.{e}.{w}.weight"] for e in range(config["n_routed_experts"])])
        for w in ("w1", "w2", "w3")
    )
    # Of w1 and w3, which read the same, the larger scale.
    scales = {
        w: jnp.stack([p[f"ffn.experts.{e}.{w}.input_scale"] for e in range(len(w1))])
        for w in ("w1", "w2", "w3")
        if f"ffn.experts.0.{w}.input_scale" in p
    }
    s1, s2, s3 = (p[f"ffn.shared_experts.{w}.weight"] for w in ("w1", "w2", "w3"))
    limit = config["swiglu_limit"]
    return moe.moe(
        x,
        expert_idx,
        expert_weight,
        jnp.ones(len(x), bool),
        w1,
        w2,
        w3,
        moe.shared_expert(x, s1, s2, s3, limit, rounding),
        jnp.maximum(scales["w1"], scales["w3"]) if scales else None,
        scales.get("w2"),
        limit=limit,
        dtype=jnp.bfloat16 if rounding.bf16 else jnp.float32,
        rounding=rounding,
    )


def layer(
    weights: Weights,
    config: Config,
    layer: int,
    streams: jax.Array,
    tokens: jax.Array,
    rounding: Rounding = FP32,
) -> jax.Array:
    """One layer, attention then experts, each inside a hyper-connection (section 2.3).

    Args:
        weights: All weights, or those of this layer.
        config: Official config.
        layer: Layer number; `num_hidden_layers` for the one inside the MTP module.
        streams: `[t, hc, dim]`.
        tokens: `[t]`, used by hash layers only.
        rounding: Rounding points.

    Returns:
        `[t, hc, dim]`.
    """
    p = {name: jnp.asarray(w) for name, w in layer_weights(weights, config, layer).items()}
    m, eps = config["compress_ratios"][layer], config["rms_norm_eps"]
    mhc: dict[str, Any] = {
        "iters": config["hc_sinkhorn_iters"],
        "hc_eps": config["hc_eps"],
        "rms_eps": eps,
        "rounding": rounding,
    }

    read = mhc_pre.mhc_pre(streams, p["hc_attn_fn"], p["hc_attn_base"], p["hc_attn_scale"], **mhc)
    x = rmsnorm.rmsnorm(read[0], p["attn_norm.weight"], eps, rounding)
    f = attention_branch(p, config, m, x, rounding)
    streams = mhc_post.mhc_post(f, streams, read[1], read[2], rounding)

    read = mhc_pre.mhc_pre(streams, p["hc_ffn_fn"], p["hc_ffn_base"], p["hc_ffn_scale"], **mhc)
    x = rmsnorm.rmsnorm(read[0], p["ffn_norm.weight"], eps, rounding)
    f = moe_branch(p, config, x, tokens, rounding)
    return mhc_post.mhc_post(f, streams, read[1], read[2], rounding)


def embed(weights: Weights, config: Config, tokens: jax.Array) -> jax.Array:
    """`hc` copies of the embedding row of each token: `[t, hc, dim]` (section 2.1)."""
    rows = jnp.asarray(weights["embed.weight"])[jnp.asarray(tokens)]
    return jnp.repeat(rows[:, None, :], config["hc_mult"], axis=1)


def head(
    weights: Weights,
    config: Config,
    streams: jax.Array,
    rounding: Rounding = FP32,
    prefix: str = "",
) -> jax.Array:
    """Logits `[t, V]` of `streams [t, hc, dim]`, never rounded (section 6.1).

    `prefix` "mtp.0." takes the collapse and the norm of the MTP module; the head is shared.
    """
    p = {name: jnp.asarray(w) for name, w in weights.items() if "layers." not in name}
    eps = config["rms_norm_eps"]
    hc = (p[prefix + name] for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"))
    h = mhc_head.mhc_head(streams, *hc, hc_eps=config["hc_eps"], rms_eps=eps, rounding=rounding)
    return linear.product(
        rmsnorm.rmsnorm(h, p[prefix + "norm.weight"], eps, rounding), p["head.weight"], rounding
    )


def streams(
    weights: Weights, config: Config, tokens: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """The streams after every main layer, `[L, t, hc, dim]`."""
    s, after = embed(weights, config, tokens), []
    for i in range(config["num_hidden_layers"]):
        s = layer(weights, config, i, s, tokens, rounding)
        after.append(s)
    return jnp.stack(after)


def forward(
    weights: Weights, config: Config, tokens: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Logits `[t, V]` of every position."""
    return head(weights, config, streams(weights, config, tokens, rounding)[-1], rounding)


def mtp(
    weights: Weights,
    config: Config,
    streams: jax.Array,
    next_tokens: jax.Array,
    rounding: Rounding = FP32,
) -> tuple[jax.Array, jax.Array]:
    """Multi-token prediction (section 6.2).

    `S0_j = bf(lin8(RMSNorm(embed[x_{i+1}]; enorm); e_proj) + lin8(RMSNorm(S_i[j]; hnorm);
    h_proj))`, then the module's layer at position `i`, then its own collapse and norm and the
    shared head.

    Args:
        weights: All weights; official names.
        config: Official config.
        streams: Main streams after the last layer, `[t, hc, dim]`, positions `0 ... t - 1`.
        next_tokens: `[t]`, the token after each position.
        rounding: Rounding points.

    Returns:
        Logits `[t, V]` for the token after the next one, and the module's streams `[t, hc, dim]`.
    """
    eps = config["rms_norm_eps"]
    p = {
        name: jnp.asarray(w)
        for name, w in layer_weights(weights, config, config["num_hidden_layers"]).items()
    }
    row = jnp.asarray(weights["embed.weight"])[jnp.asarray(next_tokens)]
    e = linear.lin8(
        rmsnorm.rmsnorm(row, p["enorm.weight"], eps, rounding), p["e_proj.weight"], rounding
    )
    h = linear.lin8(
        rmsnorm.rmsnorm(streams, p["hnorm.weight"], eps, rounding), p["h_proj.weight"], rounding
    )
    s = layer(
        weights,
        config,
        config["num_hidden_layers"],
        rounding.bf(e[:, None, :] + h),
        next_tokens,
        rounding,
    )
    return head(weights, config, s, rounding, "mtp.0."), s
