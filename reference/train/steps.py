"""One step of the training: initial weights, losses, optimiser, the bias rule of the router."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from reference.rounding import FP32, Rounding
from reference.train.config import kind, shapes
from reference.train.model import NVFP4, PLAIN, TRAINED, Config, Weights, forward, quantized

# Weights and roundings of a phase; each is compiled once.
PRESETS: dict[str, tuple[str, Rounding]] = {
    "bf16": ("bf16", PLAIN),
    "official": ("official", TRAINED),
    "nvfp4": ("nvfp4", NVFP4),
    "master": ("master", FP32),
}

WEIGHT_DECAY = 0.1
BIAS_RATE = 1e-3
MTP_WEIGHT = 0.2
INDEX_WEIGHT = 0.1
LOOP_WEIGHT = 4.0  # times the part of the tokens that are copies


class Knobs(NamedTuple):
    """What changes from step to step without a compilation.

    Attributes:
        rate: Learning rate.
        dropout: On the branch outputs.
        sparse: Whether ratio-4 layers attend to the indexer's picks only.
        loop_decay: The third occurrence of a stretch in a row may be at most so likely, compared
            with the second, the fourth with the third, and so on.
    """

    rate: jax.Array
    dropout: jax.Array
    sparse: jax.Array
    loop_decay: jax.Array


class State(NamedTuple):
    """All that a step changes."""

    step: jax.Array
    weights: Weights
    moments: Any


def init_weights(config: Config, seed: int) -> tuple[Weights, Weights]:
    """Random FP32 weights, and the tables of the hash layers.

    Branches start at zero (`wo_b`, `w2`, head), streams are kept apart by different biases of the
    hyper-connections, and every expert has as many tokens as the others in a hash layer.
    """
    rng = np.random.default_rng(seed)
    hc, experts = config["hc_mult"], config["n_routed_experts"]
    weights, tables = {}, {}
    for i, (name, shape) in enumerate(shapes(config).items()):
        leaf = name.split(".")[-1] if not name.endswith(".weight") else name.split(".")[-2]
        if leaf == "tid2eid":
            first = rng.permutation(shape[0]) % experts
            step = 1 + rng.integers(experts - 1, size=shape[0])
            turns = np.arange(shape[1])
            if shape[1] > 2:
                step[:] = 1
            tables[name] = ((first[:, None] + step[:, None] * turns) % experts).astype(np.int32)
            continue
        if "norm" in leaf:
            w = np.ones(shape)
        elif leaf in ("wo_b", "w2", "head", "bias", "attn_sink"):
            w = np.zeros(shape)
        elif leaf == "embed":
            w = 0.5 * rng.standard_normal(shape)
        elif leaf.endswith("_scale"):
            w = np.full(shape, 0.2)
        elif leaf.endswith("_fn"):
            w = 0.02 * rng.standard_normal(shape)
        elif leaf.endswith("_base"):
            w = np.zeros(shape)
            own = i % hc
            w[:hc] = np.where(np.arange(hc) == own, 0.5, -1.0)
            if shape[0] > hc:
                w[hc : 2 * hc] = np.where(np.arange(hc) == own, 0.5, -0.2)
                w[2 * hc :] = 3 * np.eye(hc).reshape(-1)
        elif leaf == "ape":
            w = 0.02 * rng.standard_normal(shape)
        else:
            w = 0.7 * rng.standard_normal(shape) * shape[-1] ** -0.5
        weights[name] = jnp.asarray(w, jnp.float32)
    return weights, {name: jnp.asarray(w) for name, w in tables.items()}


def _label(config: Config, name: str, shape: tuple[int, ...]) -> str:
    if name.endswith("gate.bias"):
        return "rule"
    matrix = kind(config, name) in ("fp8", "mxfp4") or "compressor.w" in name
    if matrix and len(shape) > 1:
        return "muon"
    if name.endswith(("_fn", "gate.weight", "weights_proj.weight")):
        return "slow"
    return "table" if name in ("embed.weight", "head.weight") else "adam"


def _adam_sized(update: jax.Array) -> jax.Array:
    """An orthogonal update with the root mean square that Adam's have (arXiv:2502.16982)."""
    return 0.2 * max(update.shape[-2:]) ** 0.5 * update


def optimizer(config: Config) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for the rest; updates before the learning rate."""

    def dimensions(updates: Any) -> Any:
        return jax.tree.map(lambda _: MuonDimensionNumbers(-1, -2), updates)

    adam = optax.scale_by_adam(0.9, 0.95)
    parts: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            scale_by_muon(weight_dimension_numbers=dimensions),
            optax.stateless(lambda updates, _: jax.tree.map(_adam_sized, updates)),
            optax.add_decayed_weights(WEIGHT_DECAY),
        ),
        "table": optax.chain(adam, optax.add_decayed_weights(WEIGHT_DECAY)),
        "adam": adam,
        "slow": optax.chain(adam, optax.scale(0.1)),  # few outputs, each a sum of many inputs
        "rule": optax.set_to_zero(),
    }
    labels = {name: _label(config, name, shape) for name, shape in shapes(config).items()}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(parts, lambda w: {name: labels[name] for name in w}),
    )


def losses(
    weights: Weights,
    tables: Weights,
    config: Config,
    preset: str,
    tokens: jax.Array,
    back: jax.Array,
    knobs: Knobs,
    key: jax.Array | None,
    remat: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch and its parts, in nats per token.

    Args:
        tokens: `[b, t + 2]`: the model reads `t`, its MTP module predicts two further.
        back: `[b, t + 2]`, from `data.repeat_rows`; zeros for text.
    """
    how, rounding = PRESETS[preset]
    t = tokens.shape[1] - 2
    logits, drafted, aux = forward(
        quantized(weights, config, how) | tables,
        config,
        tokens[:, :t],
        rounding,
        sparse=knobs.sparse,
        dropout=knobs.dropout,
        key=key,
        next_tokens=tokens[:, 1:-1],
        remat=remat,
    )
    assert drafted is not None
    log_p = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(log_p, tokens[:, 1:-1, None], axis=-1)[..., 0]
    back = back[:, 1:-1]
    text = back == 0
    ce = -jnp.sum(jnp.where(text, of_target, 0)) / jnp.maximum(text.sum(), 1)

    # A copy has to be less likely than the one before it (after DITTO, arXiv:2206.02369).
    before = jnp.maximum(jnp.arange(t) - jnp.maximum(back, 0), 0)
    ceiling = knobs.loop_decay * jnp.exp(jnp.take_along_axis(of_target, before, axis=1))
    excess = jax.nn.relu(jnp.exp(of_target) - jax.lax.stop_gradient(ceiling))
    loops = -jnp.log(jnp.maximum(1 - excess, 1e-4))
    loop = jnp.sum(jnp.where(back > 0, loops, 0)) / jnp.maximum((back > 0).sum(), 1)

    # The MTP module learns the text and what the main model itself will say next.
    log_q = jax.nn.log_softmax(drafted)
    ahead = -jnp.take_along_axis(log_q, tokens[:, 2:, None], axis=-1)[..., 0]
    draft_text = text & jnp.roll(text, -1, axis=1)
    own = -jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p[:, 1:])) * log_q[:, :-1], axis=-1)
    n = jnp.maximum(draft_text.sum(), 1)
    mtp = 0.5 * jnp.sum(jnp.where(draft_text, ahead, 0)) / n
    mtp = mtp + 0.5 * jnp.sum(jnp.where(draft_text[:, :-1], own, 0)) / n
    agree = jnp.argmax(drafted[:, :-1], -1) == jnp.argmax(logits[:, 1:], -1)

    total = ce + LOOP_WEIGHT * loop * jnp.mean(back > 0) + MTP_WEIGHT * mtp
    total = total + INDEX_WEIGHT * aux.index_kl
    parts = {
        "ce": ce,
        "loop": loop,
        "mtp": mtp,
        "mtp_agree": jnp.mean(agree),
        "index_kl": aux.index_kl,
        "load": aux.load,
    }
    return total, parts


def make_step(config: Config, preset: str, seed: int, remat: bool) -> Any:
    """Jitted `(state, tables, tokens, back, knobs) -> (state, parts)`; donates the state."""
    tx = optimizer(config)
    routed = [
        f"{prefix}ffn.gate.bias"
        for prefix in [*(f"layers.{i}." for i in range(config["num_hidden_layers"])), "mtp.0."]
    ]

    def step(state: State, tables: Weights, tokens: jax.Array, back: jax.Array, knobs: Knobs):
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        (_, parts), grads = jax.value_and_grad(losses, has_aux=True)(
            state.weights, tables, config, preset, tokens, back, knobs, key, remat
        )
        updates, moments = tx.update(grads, state.moments, state.weights)
        weights = jax.tree.map(lambda w, u: w - knobs.rate * u, state.weights, updates)
        for i, name in enumerate(routed):
            if name in weights:  # hash layers have none
                load = parts["load"][i]
                weights[name] += BIAS_RATE * jnp.sign(jnp.mean(load) - load)
        parts["grad_norm"] = optax.tree.norm(grads)
        return State(state.step + 1, weights, moments), parts

    return jax.jit(step, donate_argnums=0)


def init_state(config: Config, seed: int) -> tuple[State, Weights]:
    """Weights, zero moments and the tables."""
    weights, tables = init_weights(config, seed)
    return State(jnp.int32(0), weights, optimizer(config).init(weights)), tables


def make_evaluate(config: Config, preset: str) -> Any:
    """Jitted `(weights, tables, tokens [b, t + 2]) -> (bits [b, t], MTP agreement [b, t - 1])`."""
    how, rounding = PRESETS[preset]

    def evaluate(weights: Weights, tables: Weights, tokens: jax.Array):
        logits, drafted, _ = forward(
            quantized(weights, config, how) | tables,
            config,
            tokens[:, :-2],
            rounding,
            next_tokens=tokens[:, 1:-1],
        )
        assert drafted is not None
        log_p = jax.nn.log_softmax(logits)
        bits = -jnp.take_along_axis(log_p, tokens[:, 1:-1, None], axis=-1)[..., 0] / np.log(2)
        agree = jnp.argmax(drafted[:, :-1], -1) == jnp.argmax(logits[:, 1:], -1)
        return bits, agree

    return jax.jit(evaluate)


def make_greedy(config: Config, preset: str) -> Any:
    """Jitted greedy continuation by repeated full passes: `(weights, tables, rows, start) -> rows`.

    `rows [b, t]` hold prompts of `start` tokens; the rest is filled.
    """
    how, rounding = PRESETS[preset]

    def greedy(weights: Weights, tables: Weights, rows: jax.Array, start: jax.Array):
        values = quantized(weights, config, how) | tables

        def one(at: jax.Array, rows: jax.Array) -> jax.Array:
            logits, _, _ = forward(values, config, rows, rounding)
            token = jnp.argmax(logits[:, at - 1], axis=-1).astype(rows.dtype)
            return rows.at[:, at].set(token)

        return jax.lax.fori_loop(start, rows.shape[1], one, rows)

    return jax.jit(greedy)
