"""The training: its model against the reference's, formats, steps, states and the export."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsv4_jax
from reference import indexer, mhc_post
from reference import model as ref
from reference.rounding import FP32, OFFICIAL, Rounding, bf
from reference.train import export, state, steps
from reference.train import model as train_model
from reference.train import run as train_run
from reference.train.config import CONFIG, kind, shapes, stored_bytes
from reference.weights import dequantize_official
from tests.support.numerics import assert_same_bits, assert_same_tree, bf16_ulp, cosine
from tests.support.official import read_raw

# One layer of each kind, hash and score routing, ties among few index heads, a real selection.
SMALL = CONFIG | {
    "compress_ratios": [0, 4, 128, 0],
    "head_dim": 128,
    "hidden_size": 128,
    "index_n_heads": 2,
    "index_topk": 16,
    "n_routed_experts": 3,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "o_groups": 1,
    "vocab_size": 256,
}
# For what compiles a backward pass.
TINY = SMALL | {"compress_ratios": [4, 0, 0], "num_hidden_layers": 2}
LENGTH = 384
# FP32 sums in another order, in logits of up to 5: measured 6e-6.
PARITY_ABS = 2e-5
TRAINED = Rounding(**(dataclasses.asdict(OFFICIAL) | {"bf16_scores": False}))


def random_weights(config, seed=0):
    """Weights that leave no branch silent, unlike those that training starts from."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config).items():
        if name.endswith("tid2eid"):
            picks = np.argsort(rng.random((shape[0], config["n_routed_experts"])), axis=1)
            out[name] = picks[:, : shape[1]].astype(np.int32)
            continue
        if "norm" in name:
            w = 1 + 0.1 * rng.standard_normal(shape)
        elif name.endswith("scale"):
            w = np.full(shape, 0.5)
        else:
            w = rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        out[name] = w.astype(np.float32)
    return {name: jnp.asarray(w) for name, w in out.items()}


def tables_of(weights):
    """Trained weights, and the tables of the hash layers."""
    tables = {name: w for name, w in weights.items() if name.endswith("tid2eid")}
    return {name: w for name, w in weights.items() if name not in tables}, tables


@pytest.fixture(scope="module")
def small():
    """Random weights of SMALL."""
    return random_weights(SMALL)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 256, (2, LENGTH + 1)).astype(np.int32)


def official_names(weights):
    return {name: jnp.asarray(w) for name, w in export.unstacked(weights)}


def run_forward(config, weights, tokens):
    """Logits, drafted logits and the rest of the training's model in FP32."""

    @jax.jit
    def run(weights, tokens, next_tokens):
        return train_model.forward(weights, config, tokens, FP32, next_tokens=next_tokens)

    return run(weights, tokens[:, :-1], tokens[:, 1:])


@pytest.fixture(scope="module")
def expected(small, tokens):
    """Logits and drafted logits of the reference, sequence by sequence."""

    @jax.jit
    def run(weights, tokens):
        streams = ref.streams(weights, SMALL, tokens[:-1])[-1]
        drafted, _ = ref.mtp(weights, SMALL, streams, tokens[1:])
        return ref.head(weights, SMALL, streams), drafted

    weights = official_names(small)
    rows = [run(weights, row) for row in tokens]
    return [np.stack(parts) for parts in zip(*rows, strict=True)]


def errors(actual, expected):
    return [float(np.abs(a - e).max()) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.slow
def test_forward_like_the_reference(small, tokens, expected):
    logits, drafted, aux = run_forward(SMALL, small, tokens)
    found = errors((logits, drafted), expected)
    print(found, float(np.abs(expected[0]).max()))
    assert max(found) < PARITY_ABS
    assert aux.load.shape == (4, 3)
    np.testing.assert_allclose(aux.load.sum(axis=1), 1, rtol=1e-6)  # FP32 mean of one-hots
    assert aux.index_kl > 0


def comb_transposed(monkeypatch):
    right = mhc_post.mhc_post
    monkeypatch.setattr(
        mhc_post,
        "mhc_post",
        lambda f, s, post, comb, *rest: right(f, s, post, comb.swapaxes(1, 2), *rest),
    )
    return SMALL


def window_one_too_narrow(monkeypatch):
    return SMALL | {"sliding_window": 127}


def picks_one_too_few(monkeypatch):
    return SMALL | {"index_topk": 15}


WRONG = [comb_transposed, window_one_too_narrow, picks_one_too_few]


@pytest.mark.slow
@pytest.mark.parametrize("variant", WRONG)
def test_wrong_variant_is_not_like_the_reference(monkeypatch, small, tokens, expected, variant):
    config = variant(monkeypatch)
    logits, drafted, _ = run_forward(config, small, tokens)
    found = errors((logits, drafted), expected)
    print(variant.__name__, found)
    assert min(found) > PARITY_ABS


def layer_input(layer):
    """Random streams in BF16, and tokens."""
    rng = np.random.default_rng(layer)
    streams = bf(jnp.asarray(rng.standard_normal((LENGTH, 4, 128)), jnp.float32))
    return streams, jnp.asarray(rng.integers(0, 256, LENGTH), jnp.int32)


@pytest.fixture(scope="module")
def official_layer(small):
    """`layer -> streams` of the reference in the official formats, each computed once."""
    values = train_model.quantized(small, SMALL, "official")

    @functools.cache
    def run(layer):
        prefix = ref.layer_prefix(SMALL, layer)
        named = official_names({n: w for n, w in values.items() if n.startswith(prefix)})
        function = jax.jit(lambda w, s, t: ref.layer(w, SMALL, layer, s, t, TRAINED))
        return np.asarray(function(named, *layer_input(layer)))

    return run


def agreement(config, weights, layer, expected, rounding=train_model.TRAINED):
    """Part of the elements within one ulp; norm of the error by that of the layer's work."""
    streams, tokens = layer_input(layer)
    p = train_model.quantized(weights, SMALL, "official")
    p, m = train_model.part(p, ref.layer_prefix(SMALL, layer)), config["compress_ratios"][layer]

    @jax.jit
    def run(p, streams):
        args = streams[None], tokens[None], jnp.asarray(True), rounding, jnp.float32(0), None
        return train_model.layer(p, config, m, *args)[0][0]

    actual = np.asarray(run(p, streams))
    ulp = bf16_ulp(np.maximum(np.abs(actual), np.abs(expected)))
    within = float(np.mean(np.abs(actual - expected) <= ulp))
    work = np.linalg.norm(expected - np.asarray(streams))
    return within, float(np.linalg.norm(actual - expected) / work)


# Training rounds the sum of the routed experts, the official code each expert's output, too:
# measured 0.921 to 0.928 and 0.0018 to 0.0024, and 1.0 in layer 0 when the reference sums likewise.
# The best wrong variant below reaches 0.39 and 0.027.
WITHIN_ULP = 0.9
RATIO = 0.004


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2, 3], ids=["swa-hash", "csa", "hca", "mtp"])
def test_layer_in_the_official_formats_like_the_reference(small, official_layer, layer):
    within, ratio = agreement(SMALL, small, layer, official_layer(layer))
    print(within, ratio)
    assert within > WITHIN_ULP
    assert ratio < RATIO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "rounding"),
    [
        pytest.param({"sliding_window": 127}, {}, id="window-127"),
        pytest.param({}, {"bf16_q_norm": False}, id="query-norm-rounded-once"),
        pytest.param({}, {"index_fp4": False}, id="indexer-in-bf16"),
    ],
)
def test_wrong_layer_in_the_official_formats(small, official_layer, config, rounding):
    rounding = dataclasses.replace(train_model.TRAINED, **rounding)
    within, ratio = agreement(SMALL | config, small, 1, official_layer(1), rounding)
    print(within, ratio)
    assert within < WITHIN_ULP
    assert ratio > RATIO


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_selection_like_the_reference_with_ties(k):
    """Scores of four values, so that nearly every choice is among equals."""
    rng = np.random.default_rng(k)
    scores = jnp.asarray(rng.integers(-1, 3, (64, 32)), jnp.float32)
    visible = jnp.arange(32)[None, :] < jnp.arange(64)[:, None] // 2
    expected = indexer.topk_visible(scores, visible, k)
    assert_same_bits(train_model._selected(scores, visible, k), expected)
    picked = np.asarray(expected).sum(axis=1)
    np.testing.assert_array_equal(picked, np.minimum(k, np.arange(64) // 2))


SPECS = ["ti,oi->to", "bqhd,bkd->bqhk", "thn,nd->thd", "tei,edi->td"]
BF16_PRODUCTS = Rounding(bf16=True, bf16_products=True)


def operands(spec, make):
    """Two operands and a cotangent, with axes of different small sizes."""
    inputs, out = spec.split("->")
    sizes = {letter: 3 + i for i, letter in enumerate(sorted(set(spec) - set(",->")))}
    return [make([sizes[axis] for axis in axes]) for axes in (*inputs.split(","), out)]


@pytest.mark.parametrize("spec", SPECS)
def test_bf16_products_round_their_operands(spec):
    rng = np.random.default_rng(0)
    a, b, _ = operands(spec, lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32))
    expected = jnp.einsum(spec, bf(a), bf(b), precision="highest")
    assert_same_bits(BF16_PRODUCTS.einsum(spec, a, b), expected)
    assert np.abs(expected - FP32.einsum(spec, a, b)).max() > 1e-4  # it makes a difference


@pytest.mark.parametrize("spec", SPECS)
def test_bf16_products_have_the_gradient_of_the_product(spec):
    """Of integers, whose products and sums are exact in any order."""
    rng = np.random.default_rng(0)
    a, b, out = operands(spec, lambda shape: jnp.asarray(rng.integers(-9, 10, shape), jnp.float32))
    _, backward = jax.vjp(functools.partial(BF16_PRODUCTS.einsum, spec), a, b)
    _, expected = jax.vjp(functools.partial(FP32.einsum, spec), a, b)
    assert_same_tree(backward(out), expected(out))
    assert any(np.abs(g).max() > 0 for g in expected(out))


def test_bf16_products_round_the_cotangent_and_not_the_gradient():
    a, b = jnp.full((1, 1), 257 / 256, jnp.float32), jnp.full((1, 1), 129 / 128, jnp.float32)
    _, backward = jax.vjp(functools.partial(BF16_PRODUCTS.einsum, "ti,oi->to"), a, b)
    grad_a, grad_b = backward(jnp.full((1, 1), 3 + 1 / 256, jnp.float32))  # 257 / 256 -> 1
    assert (float(grad_a[0, 0]), float(grad_b[0, 0])) == (3 * 129 / 128, 3)


def restacked(weights):
    """The experts of a layer as one array, as the training has them."""
    out, experts = {}, {}
    for name, w in weights.items():
        if ".ffn.experts." not in name:
            out[name] = w
            continue
        prefix, e, which = name.removesuffix(".weight").rsplit(".", 2)
        experts.setdefault(f"{prefix}.{which}", {})[int(e)] = w
    stacks = {name: np.stack([w[e] for e in range(len(w))]) for name, w in experts.items()}
    return out | stacks


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The checkpoint of the small weights, written from the files of a run."""
    folder = tmp_path_factory.mktemp("run")
    train_run.save_weights(*tables_of(small), folder)
    (folder / "tokenizer.json").write_text("{}")
    size = export.export(SMALL, folder, folder, folder / "out")
    assert size == (folder / "out" / "model.safetensors").stat().st_size
    return folder / "out"


def test_export_holds_what_training_multiplied_with(small, exported):
    """Bit by bit, in every format of the release."""
    decoded = restacked(dequantize_official(read_raw(exported / "model.safetensors")))
    values = train_model.quantized(small, SMALL, "official")
    assert {kind(SMALL, name) for name in values} == {"fp8", "mxfp4", "bf16", "f32", "i64"}
    assert_same_tree(decoded, {name: np.asarray(w) for name, w in values.items()})


def test_export_stores_as_many_bytes_as_the_config_says(exported):
    raw = read_raw(exported / "model.safetensors")
    assert sum(data.nbytes for _, _, data in raw.values()) == stored_bytes(SMALL)
    names = set(shapes(SMALL))
    whole = {n for n in raw if not n.endswith(".scale") and ".ffn.experts." not in n}
    assert whole == {name for name in names if ".ffn.experts." not in name}


@pytest.mark.slow
def test_export_is_what_dsv4_jax_computes_with(small, exported, tokens):
    """The product, prefilled, against the training's forward pass; not with `w1` as `w3`."""
    model, params = dsv4_jax.from_checkpoint(exported, mtp=True, progress=False)
    prompt = 60
    cache = model.init_cache(2, 128)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens[:, :prompt], cache)

    @jax.jit
    def trained(weights, tokens):
        return train_model.forward(weights, SMALL, tokens, train_model.TRAINED)[0]

    values = train_model.quantized(small, SMALL, "official")
    expected = trained(values, tokens[:, :128])[:, :prompt]
    w1, w3 = ("layers.2.ffn.experts." + name for name in ("w1", "w3"))
    wrong = trained(values | {w1: values[w3], w3: values[w1]}, tokens[:, :128])[:, :prompt]
    print(cosine(logits, expected), cosine(logits, wrong))
    # Random weights amplify what is rounded elsewhere and turn single picks: measured 0.9966 here,
    # 0.9981 between the product and the reference in its own formats, 0.951 for the wrong variant.
    assert cosine(logits, expected) > 0.99 > cosine(logits, wrong)


def test_export_refuses_weights_of_another_model(small):
    weights = {name: np.asarray(w) for name, w in small.items()}
    del weights["norm.weight"]
    weights["head.weight"] = weights["head.weight"][:-1]
    with pytest.raises(ValueError, match=r"head\.weight.*norm\.weight"):
        export.official_tensors(SMALL, weights)


def test_weights_of_a_run_in_several_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "SHARD", 2**20)
    train_run.save_weights(*tables_of(small), tmp_path)
    files = list(tmp_path.glob("master-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 2**20 + 2**15 for file in files)
    assert_same_tree(train_run.read_weights(tmp_path), {n: np.asarray(w) for n, w in small.items()})


def test_weights_of_no_run(tmp_path):
    with pytest.raises(ValueError, match="has no master"):
        train_run.read_weights(tmp_path)


# One batch for all steps of the tiny model, with copies in its second row.
ROWS, TINY_LENGTH = 2, 128
COPIES = slice(60, 120)
PERIOD = 10


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 256, (ROWS, TINY_LENGTH + 2)).astype(np.int32)
    back = np.zeros_like(tokens)
    tokens[1, COPIES] = np.resize(tokens[1, COPIES.start - PERIOD : COPIES.start], 60)
    back[1, COPIES] = PERIOD
    back[1, COPIES.start : COPIES.start + PERIOD] = -1
    return tokens, back


@pytest.fixture(scope="module")
def tiny():
    """Random weights and tables of TINY."""
    return tables_of(random_weights(TINY, 5))


@pytest.fixture(scope="module")
def compiled():
    """Every step is compiled once, whoever makes it."""
    return functools.cache(functools.partial(steps.make_step, TINY))


@pytest.fixture(scope="module")
def evaluate():
    """`make_evaluate` of TINY, compiled once for a preset."""
    return functools.cache(functools.partial(steps.make_evaluate, TINY))


PARTS = ("ce", "loop", "mtp", "index_kl")


@pytest.fixture(scope="module")
def gradient(tiny):
    """`(weights, tokens, back, knobs, {part: factor}) -> (parts, gradient of their sum)`."""

    @jax.jit
    def run(weights, tokens, back, knobs, factors):
        def total(weights):
            args = TINY, "bf16", tokens, back, knobs, None, False
            _, parts = steps.losses(weights, tiny[1], *args)
            return sum(factor * parts[name] for name, factor in factors.items()), parts

        (_, parts), grads = jax.value_and_grad(total, has_aux=True)(weights)
        return parts, grads

    def call(weights, tokens, back, knobs, **factors):
        factors = {name: jnp.float32(factors.get(name, 0)) for name in PARTS}
        return run(weights, tokens, back, knobs, factors)

    return call


def knobs(rate=4e-3, dropout=0.0, sparse=True, loop_decay=0.5):
    values = jnp.float32(rate), jnp.float32(dropout), jnp.asarray(sparse), jnp.float32(loop_decay)
    return steps.Knobs(*values)


def start(config, seed=0):
    """State and tables without weak types, which would compile a step twice."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), steps.init_state(config, seed))


def state_of(weights):
    moments = steps.optimizer(TINY).init(weights)
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), steps.State(0, weights, moments))


@pytest.mark.slow
def test_losses_fall_on_one_batch(compiled, batch):
    current, tables = start(TINY)
    step, losses = compiled("bf16", PLAN.seed, False), []
    for _ in range(8):
        before = {n: np.asarray(w) for n, w in current.weights.items() if n.endswith("gate.bias")}
        current, parts = step(current, tables, batch[0], np.zeros_like(batch[1]), knobs())
        losses.append([float(parts[name]) for name in ("ce", "mtp")])
        assert set(before) == {"layers.1.ffn.gate.bias", "mtp.0.ffn.gate.bias"}  # 0 is hashed
        for (name, bias), load in zip(sorted(before.items()), parts["load"][1:], strict=True):
            moved = np.float32(steps.BIAS_RATE) * np.sign(np.mean(load) - np.asarray(load))
            assert_same_bits(np.asarray(current.weights[name]), bias + moved.astype(np.float32))
            assert np.abs(moved).max() > 0
    print(losses)
    assert int(current.step) == 8
    np.testing.assert_allclose(losses[0][0], np.log(256), rtol=1e-6)  # the head starts at zero
    assert (np.diff(losses, axis=0) < 0).all()
    assert losses[-1][0] < 0.75 * losses[0][0]  # measured 0.48


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False], ids=["picks", "every-entry"])
def test_index_loss_teaches_the_indexer_alone(gradient, tiny, batch, sparse):
    weights = tiny[0]
    of_index = {name for name in weights if ".attn.indexer." in name}
    assert len(of_index) == 6
    with_index = gradient(weights, *batch, knobs(sparse=sparse), index_kl=1)[1]
    without = gradient(weights, *batch, knobs(sparse=sparse), ce=1, loop=1, mtp=1)[1]
    silent = {name for name in weights if name.endswith("gate.bias")}
    for name in weights:
        taught = bool(np.abs(with_index[name]).max() > 0), bool(np.abs(without[name]).max() > 0)
        assert taught == (name in of_index, name not in of_index | silent), name


@pytest.mark.slow
def test_losses_are_what_they_say(gradient, evaluate, tiny, batch):
    """`ce` and `loop` from the probabilities of the evaluation."""
    tokens, back = batch
    found, _ = gradient(tiny[0], tokens, back, knobs())
    bits, agree = evaluate("bf16")(*tiny, tokens)
    p, back = 2.0 ** -np.asarray(bits, np.float64), back[:, 1:-1]
    ce = -np.log(p[back == 0]).mean()
    loops = []
    for row, i in np.argwhere(back > 0):
        excess = max(p[row, i] - 0.5 * p[row, i - back[row, i]], 0)
        loops.append(-np.log(max(1 - excess, 1e-4)))
    # FP32 against FP64, and a second compilation.
    np.testing.assert_allclose(found["ce"], ce, rtol=1e-5)
    # Small differences of probabilities: measured 3e-4.
    np.testing.assert_allclose(found["loop"], np.mean(loops), rtol=2e-3)
    np.testing.assert_allclose(found["mtp_agree"], np.mean(agree), rtol=1e-6)
    assert 0 < np.mean(np.array(loops) > 0) < 1


@pytest.mark.slow
def test_loop_loss_pushes_copies_down(gradient, evaluate, tiny, batch):
    tokens, back = batch
    weights, tables = tiny
    for nothing in (np.zeros_like(back), np.minimum(back, 0)):  # text, and second occurrences
        parts, grads = gradient(weights, tokens, nothing, knobs(), loop=1)
        assert parts["loop"] == 0
        assert all((np.asarray(g) == 0).all() for g in grads.values())
    # Copies that may be as likely as they like.
    assert gradient(weights, tokens, back, knobs(loop_decay=1e9))[0]["loop"] == 0
    parts, grads = gradient(weights, tokens, back, knobs(), loop=1)
    assert parts["loop"] > 0
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in grads.values())))
    after = {name: w - 0.02 * grads[name] / norm for name, w in weights.items()}
    copies = back[:, 1:-1] > 0
    p, q = (np.exp2(-evaluate("bf16")(w, tables, tokens)[0])[copies] for w in (weights, after))
    print(p.mean(), q.mean(), float(parts["loop"]))
    assert q.mean() < p.mean()
    assert gradient(after, tokens, back, knobs())[0]["loop"] < parts["loop"]


@pytest.mark.slow
def test_dropout(compiled, gradient, tiny, batch):
    """A step without dropout has the losses of no key; with dropout others, each step its own."""
    weights, tables = tiny
    quiet = gradient(weights, *batch, knobs())[0]
    step = compiled("bf16", PLAN.seed, False)
    made = step(state_of(weights), tables, *batch, knobs())[1]
    for name in (*PARTS, "mtp_agree"):  # two compilations of the same sums
        np.testing.assert_allclose(made[name], quiet[name], rtol=1e-5, err_msg=name)
    found = []
    for number in (0, 1, 0):
        current = state_of(weights)._replace(step=jnp.int32(number))
        found.append(float(step(current, tables, *batch, knobs(dropout=0.5))[1]["ce"]))
    assert found[0] == found[2]
    assert len({*found, float(quiet["ce"])}) == 3


PLAN = train_run.Plan(
    steps=4,
    rows=ROWS,
    length=TINY_LENGTH,
    long_length=TINY_LENGTH,
    sparse_from=0.25,
    quantize_from=0.75,
    nvfp4_every=0,
)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(7)
    ids = {
        name: [np.array([0, *rng.integers(16, 256, 398), 1], np.uint16) for _ in range(n)]
        for name, n in (("train", 6), ("dev", 2), ("held_out", 2))
    }
    return train_run.Text(ids, [1] * 6, {name: [1000] * len(rows) for name, rows in ids.items()})


@pytest.fixture(scope="module")
def training(compiled, text, tmp_path_factory):
    """`train` of PLAN into a new folder: `(folder, last state)`."""

    def call(**options):
        folder = tmp_path_factory.mktemp("train")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_run, "make_step", lambda _, *args: compiled(*args))
            end, _ = train_run.train(
                TINY,
                PLAN,
                text,
                folder,
                evaluations=0,
                greedy=False,
                log_every=1,
                say=lambda line: None,
                **options,
            )
        return folder, end

    return call


@pytest.fixture(scope="module")
def halves(training):
    """A whole run, and the first half of the same."""
    return training(), training(until=2)


def lines(folder, kind):
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "seconds"} for x in made if x["kind"] == kind]


@pytest.mark.slow
def test_a_resumed_run_is_the_run(training, halves):
    (whole, end), (half, middle) = halves
    assert (int(middle.step), int(end.step)) == (2, 4)
    assert not (half / "end.state").exists() and not (half / "master-0.safetensors").exists()
    rest, again = training(resume=half / "last.state")
    assert_same_tree(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, end))
    assert (rest / "end.state").read_bytes() == (whole / "end.state").read_bytes()
    assert lines(half, "train") + lines(rest, "train") == lines(whole, "train")
    assert [x["step"] for x in lines(whole, "train")] == [0, 1, 2, 3]
    moved = {n for n, w in middle.weights.items() if (np.asarray(w) != end.weights[n]).any()}
    assert moved == set(end.weights)  # the second half does something
    saved = train_run.read_weights(whole)
    assert_same_tree({n: saved[n] for n in end.weights}, jax.tree.map(np.asarray, end.weights))


# The rounding of 16 bits moved the loss by 6e-6, that and the step after it by 1.4e-4.
PACKED_LOSS = 1e-3


@pytest.mark.slow
def test_a_packed_state_goes_on_nearly_as_well(training, halves, tmp_path):
    (whole, _), (_, middle) = halves
    file = tmp_path / "last.packed"
    size = state.save_packed(middle, file)
    assert size <= state.PACKED_LIMIT
    assert size <= file.stat().st_size < size + 2**16
    loaded = state.load_packed(middle, file)
    assert int(loaded.step) == 2
    for name, w in middle.weights.items():
        w, got = (np.asarray(x).reshape(-1) for x in (w, loaded.weights[name]))
        starts = np.arange(0, w.size, state.BLOCK)
        largest = np.repeat(np.maximum.reduceat(np.abs(w), starts), state.BLOCK)[: w.size]
        # Half a step of 1 / 32767, and an FP32 rounding.
        assert (np.abs(w - got) <= largest * 2.0**-16 * 1.01).all(), name
    rest, _ = training(resume=file)
    ours, theirs = lines(rest, "train"), lines(whole, "train")[2:]
    print([(a["ce"], b["ce"]) for a, b in zip(ours, theirs, strict=True)])
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["ce"] - b["ce"]) < PACKED_LOSS
        assert a["ce"] != b["ce"]


def test_a_packed_state_updates_no_weight_by_leaps(tmp_path):
    """Adam divides by the root of the second moment: where 8 bits make it 0, the first has to be 0.

    A gradient with one large element per block, first of one sign, then of the other.
    """
    rng = np.random.default_rng(0)
    adam = optax.scale_by_adam(0.9, 0.95)
    weights = {"w": jnp.ones(1024)}
    size = jnp.asarray(2.0 ** -rng.uniform(0, 12, 1024), jnp.float32)
    moments = adam.init(weights)
    for sign in (1, 1, 1, 1, -1, -1, -1):
        noise = jnp.asarray(rng.standard_normal(1024), jnp.float32)
        moments = adam.update({"w": size * jnp.where(size > 0.5, sign, noise)}, moments)[1]
    exact = steps.State(jnp.int32(7), weights, moments)
    state.save_packed(exact, tmp_path / "x.packed")
    packed = state.load_packed(exact, tmp_path / "x.packed")
    still = {"w": jnp.zeros(1024)}
    updates = [adam.update(still, s.moments)[0] for s in (exact, packed)]
    want, got = (np.abs(jax.tree.leaves(u)[0]).max() for u in updates)
    print(want, got)
    assert got < 2 * want


def test_packed_state_of_the_real_model_fits(tmp_path):
    """Random moments, which compress no better than real ones; the file is 40 MiB at most."""
    current, _ = steps.init_state(CONFIG, 0)
    assert state.save_packed(current, tmp_path / "x.packed") <= state.PACKED_LIMIT


def test_a_packed_state_over_the_limit_is_not_written(tmp_path, monkeypatch):
    current, _ = steps.init_state(TINY, 0)
    monkeypatch.setattr(state, "PACKED_LIMIT", 2**20)
    with pytest.raises(ValueError, match=r"packed takes \d+ bytes, the limit is 1048576"):
        state.save_packed(current, tmp_path / "x.packed")
    assert not list(tmp_path.iterdir())


OTHERS = {
    "fewer-layers": {"num_hidden_layers": 1, "compress_ratios": [4, 0]},
    "more-layers": {"num_hidden_layers": 3, "compress_ratios": [4, 0, 0, 0]},
    "wider-experts": {"moe_intermediate_size": 256},
    "more-experts": {"n_routed_experts": 4},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("form", ["exact", "packed"])
def test_the_state_of_another_model_is_refused(tmp_path, form, other):
    ours, _ = steps.init_state(TINY, 0)
    theirs, _ = steps.init_state(TINY | OTHERS[other], 0)
    save, load = {
        "exact": (state.save_exact, state.load_exact),
        "packed": (state.save_packed, state.load_packed),
    }[form]
    save(theirs, tmp_path / "x")
    with pytest.raises(ValueError, match="state:"):
        load(ours, tmp_path / "x")


@pytest.mark.slow
def test_evaluation_of_a_uniform_model(text, evaluate, monkeypatch):
    """A head of zeros: eight bits for each of 398 tokens in 1000 bytes, whatever the windows."""
    weights, tables = steps.init_weights(TINY, 0)
    monkeypatch.setattr(train_run, "make_evaluate", lambda _, preset: evaluate(preset))
    with train_run.ThreadPoolExecutor(1) as pool:
        shape = (ROWS, TINY_LENGTH + 2)
        run = train_run.Evaluator(pool, TINY, ["bf16"], text, shape, (weights, tables))
        found = run("bf16", weights, tables, "dev")
    np.testing.assert_allclose(found["bits_per_byte"], 8 * 398 / 1000, rtol=1e-6)
    assert found["mtp_agreement"] == 1  # both say token 0
