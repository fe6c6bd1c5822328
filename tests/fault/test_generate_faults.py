"""Bad inputs and faults of sampling and generation; ids are rows of the acceptance list."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DeepseekV4, Session
from dsv4_jax.generate import decode_step, generate, prefill, stream
from dsv4_jax.sampling import SamplingParams, sample, step_keys
from dsv4_jax.text import IncrementalDetokenizer, StopMatcher, encode, load_tokenizer
from tests.support.fake_model import VOCAB, FakeModel, fake_params
from tests.support.models import golden_ids, golden_layers
from tests.support.tokenizer import byte_tokenizer

NAN, INF = float("nan"), float("inf")

SETTINGS = [
    pytest.param({"temperature": -0.1}, "temperature", id="D7-temperature-negative"),
    pytest.param({"temperature": NAN}, "temperature", id="D7-temperature-nan"),
    pytest.param({"temperature": INF}, "temperature", id="D7-temperature-inf"),
    pytest.param({"temperature": "hot"}, "temperature", id="D7-temperature-text"),
    pytest.param({"top_p": 0.0}, "top_p", id="D7-top-p-zero"),
    pytest.param({"top_p": -1.0}, "top_p", id="D7-top-p-negative"),
    pytest.param({"top_p": 1.01}, "top_p", id="D7-top-p-above-one"),
    pytest.param({"top_p": NAN}, "top_p", id="D7-top-p-nan"),
    pytest.param({"top_k": -1}, "top_k", id="D7-top-k-negative"),
    pytest.param({"top_k": 1.5}, "top_k", id="D7-top-k-fraction"),
    pytest.param({"top_k": None}, "top_k", id="D7-top-k-none"),
]


class NoRun(FakeModel):
    """A model that must not be reached."""

    def init_cache(self, *, batch_size: int, max_len: int) -> Any:
        raise AssertionError("allocated a cache before checking the arguments")


def _model(**fields: Any) -> Any:
    return FakeModel(**fields)


@pytest.mark.parametrize(("settings", "name"), SETTINGS)
def test_settings_out_of_range(settings: dict[str, Any], name: str) -> None:
    model: Any = NoRun()
    scored: dict[str, Any] = {"temperature": 1.0} | settings
    with pytest.raises(ValueError, match=name):
        SamplingParams(**settings)
    with pytest.raises(ValueError, match=name):
        sample(jnp.zeros((1, 4)), jax.random.key(0), **scored)
    with pytest.raises(ValueError, match=name):
        generate(model, fake_params(), [[1]], **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0", id="D7-none-new"),
        pytest.param({"max_new_tokens": -3}, "max_new_tokens must be >= 1", id="D7-negative-new"),
        pytest.param({"prompts": [[1, VOCAB]]}, rf"\[0, {VOCAB}\), got {VOCAB}", id="D11-id-high"),
        pytest.param({"prompts": [[1], [-1]]}, r"prompt 1: .* got -1", id="D11-id-negative"),
        pytest.param({"prompts": [[2**70]]}, "token ids must be integers", id="D11-id-huge"),
        pytest.param({"prompts": [[1.0]]}, "token ids must be integers", id="D11-id-float"),
        pytest.param({"prompts": [[True]]}, "token ids must be integers", id="D11-id-bool"),
        pytest.param({"prompts": [[1], []]}, "prompt 1 is empty", id="D11-empty-prompt"),
        pytest.param({"prompts": []}, "prompts must not be an empty list", id="D11-no-prompts"),
        pytest.param({"prompts": [1, 2]}, "list of lists of token ids", id="D11-flat-list"),
        pytest.param({"prompts": ["text"]}, "list of lists of token ids", id="D11-text"),
        pytest.param({"seed": [1, 2]}, r"one per prompt \(1\), got 2", id="D13-seed-count"),
        pytest.param({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1", id="D13-seed-range"),
        pytest.param(
            {"prompts": [[1] * 9], "max_len": 8}, "has 9 tokens, max_len is 8", id="B2-prompt"
        ),
        pytest.param(
            {"prompts": [[1] * 5], "max_len": 8, "max_new_tokens": 5},
            "need 9 positions, max_len is 8",
            id="B1-completion",
        ),
    ],
)
def test_generate_refuses_before_it_runs(arguments: dict[str, Any], message: str) -> None:
    model: Any = NoRun()
    arguments = {"prompts": [[1]], **arguments}
    with pytest.raises(ValueError, match=message):
        generate(model, fake_params(), **arguments)
    with pytest.raises(ValueError, match=message):  # in the call, not at the first reading
        stream(model, fake_params(), **arguments)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        pytest.param([[1] * 6], {}, "6 in all, but the cache has max_len 5", id="B2-prefill"),
        pytest.param([[1, VOCAB]], {}, f"got {VOCAB}", id="D11-prefill-high"),
        pytest.param([[1, -7]], {}, "got -7", id="D11-prefill-negative"),
        pytest.param([[0.5]], {}, "integers", id="D11-prefill-float"),
        pytest.param([[1], [2]], {}, r"must be \[1, t\]", id="A2-prefill-batch"),
        pytest.param([1, 2], {}, r"must be \[1, t\]", id="A1-prefill-rank"),
        pytest.param([[1, 2]], {"num_tokens": [3]}, r"in \[0, 2\], got \[3\]", id="A2-count-high"),
        pytest.param([[1, 2]], {"num_tokens": [-1]}, r"got \[-1\]", id="A2-count-negative"),
        pytest.param([[1, 2]], {"num_tokens": [1, 1]}, "num_tokens must be int", id="A2-counts"),
        pytest.param([[1, 2]], {"chunk_size": 0}, "chunk_size must be >= 1", id="D7-chunk-zero"),
    ],
)
def test_prefill_refuses_and_leaves_the_cache(
    tokens: Any, options: dict[str, Any], message: str
) -> None:
    model = _model()
    cache = model.init_cache(batch_size=1, max_len=5)
    with pytest.raises(ValueError, match=message):
        prefill(model, fake_params(), tokens, cache, **options)
    assert not model.traces
    prefill(model, fake_params(), [[1, 2, 3, 4, 5]], cache)


def test_D11_padding_is_not_looked_at() -> None:
    model = _model()
    cache = model.init_cache(batch_size=1, max_len=5)
    _, cache = prefill(model, fake_params(), [[1, -100, VOCAB]], cache, num_tokens=[1])
    assert cache.lengths.tolist() == [1]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        pytest.param([VOCAB, 1], {}, f"got {VOCAB}", id="D11-decode-high"),
        pytest.param([1, -1], {}, "got -1", id="D11-decode-negative"),
        pytest.param([0.5, 1], {}, "integers", id="D11-decode-float"),
        pytest.param(jnp.zeros(2), {}, "integers", id="D11-decode-float-array"),
        pytest.param([1], {}, r"must be \[2\]", id="A2-decode-batch"),
        pytest.param([1, 2], {"active": [True]}, r"bool \[2\]", id="A2-decode-active"),
        pytest.param([1, 2], {"active": [0, 1]}, r"bool \[2\]", id="A3-decode-active"),
    ],
)
def test_decode_step_refuses(tokens: Any, options: dict[str, Any], message: str) -> None:
    model = _model()
    cache = model.init_cache(batch_size=2, max_len=5)
    with pytest.raises(ValueError, match=message):
        decode_step(model, fake_params(), tokens, cache, **options)
    assert not cache.history.is_deleted()


def test_B1_device_drops_the_write_and_flags_the_row() -> None:
    model = _model()
    cache: Any = model.init_cache(batch_size=2, max_len=3)
    _, cache = prefill(model, fake_params(), [[1, 2, 3], [4, 0, 0]], cache, num_tokens=[3, 1])
    before = jax.device_get(cache.history)
    _, cache = decode_step(model, fake_params(), [5, 6], cache)
    assert cache.lengths.tolist() == [3, 2]
    assert cache.overflow.tolist() == [True, False]
    np.testing.assert_array_equal(cache.history[0], before[0])


def test_D8_greedy_ignores_the_seed() -> None:
    runs = [generate(_model(), fake_params(), [[3, 4]], seed=s, stop_token_ids=()) for s in (0, 9)]
    assert runs[0] == runs[1]


def test_D8_greedy_is_the_first_largest_logit() -> None:
    logits = np.random.default_rng(0).integers(-9, 9, (4, 100)).astype(np.float32)
    assert ((logits == logits.max(-1, keepdims=True)).sum(-1) > 1).all(), "ties in every row"
    for key in (0, 1):
        keys = jax.random.key(key)
        tokens, valid = sample(jnp.asarray(logits), keys, temperature=0.0, top_p=0.5, top_k=7)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        assert valid.all()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([NAN, 0.0, 0.0], id="D9-nan"),
        pytest.param([INF, 0.0, 0.0], id="D9-inf"),
        pytest.param([-INF, -INF, -INF], id="D9-all-minus-inf"),
        pytest.param([-INF, NAN, INF], id="D9-mixed"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_invalid_logits_are_flagged(bad: list[float], temperature: float) -> None:
    good = [0.0, 5.0, -INF]
    logits, keys = jnp.array([good, bad, good]), step_keys(np.arange(3), np.arange(3))
    tokens, valid = sample(logits, keys, temperature=temperature, top_p=0.9)
    assert valid.tolist() == [True, False, True]
    assert int(tokens[1]) == -1
    clean, _ = sample(logits.at[1].set(0.0), keys, temperature=temperature, top_p=0.9)
    assert tokens[::2].tolist() == clean[::2].tolist()


def test_D9_only_that_sequence_stops() -> None:
    prompts = [[7, 2], [9, 4], [8, 8]]
    options: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": (), "temperature": 1.0}
    clean = generate(_model(), fake_params(), prompts, **options)
    out = generate(_model(poison_row=9, poison_at=5), fake_params(), prompts, **options)
    assert [c.finish_reason for c in out] == ["length", "invalid_logits", "length"]
    assert out[0] == clean[0]
    assert out[1] == clean[1][:3]
    assert out[2] == clean[2]
    assert out[1].error is not None
    assert "sequence 1 for position 5" in out[1].error


@pytest.mark.parametrize("top_p", [1e-9, 1e-38, 0.5])
def test_D10_dominant_token(top_p: float) -> None:
    logits = jnp.zeros((4, 100)).at[:, 42].set(30.0)
    tokens, _ = sample(logits, jax.random.key(0), temperature=1.0, top_p=top_p)
    assert tokens.tolist() == [42] * 4


def test_D10_tiny_top_p_of_equal_tokens() -> None:
    tokens, _ = sample(jnp.zeros((4, 100)), jax.random.key(0), temperature=1.0, top_p=1e-9)
    assert tokens.tolist() == [0] * 4


def test_D12_eos_first_gives_nothing() -> None:
    model = _model(eos_token_id=12, follow=True)
    out = generate(model, fake_params(), [[11], [3]], max_new_tokens=2)
    assert out == [[], [4, 5]]
    assert out[0].finish_reason == "eos"


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [None]])
def test_D12_empty_stop_string(stops: Any) -> None:
    with pytest.raises(ValueError, match="StopMatcher"):
        StopMatcher(stops)


def test_D12_stop_string_that_spans_tokens() -> None:
    tokenizer = byte_tokenizer(merges=())
    ids = encode(tokenizer, "abc größer")
    for stop, wanted in (("bc g", "a"), ("ö", "abc gr"), ("öß", "abc gr"), ("none", "abc größer")):
        text, matcher = IncrementalDetokenizer(tokenizer), StopMatcher([stop])
        shown = "".join(matcher.push(text.push(token)) for token in ids)
        assert shown + matcher.flush() == wanted
        assert matcher.stopped == (stop != "none")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_D13_order_of_the_batch(order: tuple[int, ...]) -> None:
    prompts, seeds = [[5, 6, 7], [9], [10] * 20], [4, 5, 6]
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "stop_token_ids": ()}
    wanted = generate(_model(), fake_params(), prompts, seed=seeds, **options)
    out = generate(
        _model(),
        fake_params(),
        [prompts[i] for i in order],
        seed=[seeds[i] for i in order],
        **options,
    )
    assert out == [wanted[i] for i in order]


@pytest.mark.slow
def test_D14_mtp_module_changes_no_greedy_token() -> None:
    """There is no speculative decoding: `generate` leaves the module, where it is loaded, unused.

    So this holds that a model and a cache that carry the module generate as those without it do.
    """
    model, params = golden_layers((0,))
    assert model.mtp
    plain = DeepseekV4(model.config, model.precision)
    without = {name: leaf for name, leaf in params.items() if name != "mtp_0"}
    options: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": ()}
    prompt = golden_ids(4)[0].tolist()
    with_module = generate(model, params, [prompt], **options)
    assert with_module == generate(plain, without, [prompt], **options)
    assert len(with_module[0]) == 8


def test_D15_session_cancelled_between_steps() -> None:
    """The cache goes on from where it was stopped; one that was lost is made anew."""
    model, params = _model(eos_token_id=-1), fake_params()
    whole = Session(model, params, max_len=64).stream([5, 6], max_new_tokens=10)
    wanted = [event.token for event in whole]
    session = Session(model, params, max_len=64)
    events = session.stream([5, 6], max_new_tokens=10)
    made = [next(events).token for _ in range(3)]
    events.close()
    assert session.tokens == (5, 6, *wanted[:2])
    pressed = iter([False, False, True])
    some = session.stream([5, 6, *made], max_new_tokens=7, cancelled=lambda: next(pressed))
    made += [event.token for event in some]
    assert session.reused == 4
    assert made == wanted[: len(made)]
    assert 3 < len(made) < 10

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4_jax.session.decode_step", fail)
        with pytest.raises(KeyboardInterrupt):
            list(session.stream([5, 6, *made], max_new_tokens=1))
    assert session.tokens == ()
    assert session.encode(byte_tokenizer(), "a") == encode(byte_tokenizer(), "a")
    rest = session.stream([5, 6, *made], max_new_tokens=10 - len(made))
    assert made + [event.token for event in rest] == wanted
    assert session.reused == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        pytest.param([], {}, "must be a list of token ids", id="D11-session-empty"),
        pytest.param([[1]], {}, "must be a list of token ids", id="D11-session-nested"),
        pytest.param([1.0], {}, "must be a list of token ids", id="D11-session-float"),
        pytest.param([1, VOCAB], {}, f"got {VOCAB}", id="D11-session-high"),
        pytest.param([-1], {}, "got -1", id="D11-session-negative"),
        pytest.param([1], {"seed": 2**32}, "seed must be in", id="D7-session-seed"),
        pytest.param([1], {"temperature": -1.0}, "temperature", id="D7-session-temperature"),
        pytest.param([1], {"max_new_tokens": 0}, "max_new_tokens", id="D7-session-none-new"),
        pytest.param([1] * 9, {}, "max_len is 8", id="B2-session"),
    ],
)
def test_session_refuses_and_keeps_its_cache(prompt: Any, options: Any, message: str) -> None:
    session = Session(_model(), fake_params(), max_len=8)
    list(session.stream([3, 4], max_new_tokens=2))
    held = session.tokens
    assert len(held) == 3
    with pytest.raises(ValueError, match=message):
        session.stream(prompt, **({"max_new_tokens": 1} | options))
    assert session.tokens == held


@pytest.mark.parametrize("max_len", [0, 4097])
def test_B2_session_longer_than_the_model(max_len: int) -> None:
    with pytest.raises(ValueError, match=rf"max_len must be 1\.\.4096 .* got {max_len}"):
        Session(NoRun(), {}, max_len=max_len)


def test_D15_cancelled_between_steps() -> None:
    model, params = _model(), fake_params()
    options: dict[str, Any] = {"max_new_tokens": 10, "stop_token_ids": ()}
    wanted = generate(model, params, [[5, 6]], **options)
    events: Any = stream(model, params, [[5, 6]], **options)
    assert [next(events).token for _ in range(3)] == wanted[0][:3]
    events.close()

    def fail(_sequence: int, token: int) -> None:
        if token == wanted[0][4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, params, [[5, 6]], **options, on_token=fail)
    assert generate(model, params, [[5, 6]], **options) == wanted


def test_D3_lone_surrogate() -> None:
    with pytest.raises(ValueError, match="lone surrogate at 1"):
        encode(None, "a\udcff")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": 3}'])
def test_C25_tokenizer_unreadable(tmp_path: Any, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_max_len_beyond_the_model_is_refused_in_the_call_itself():
    """Not at the first token, and not after minutes of loading."""
    with pytest.raises(ValueError, match=r"max_len 4097 exceeds .* 4096"):
        stream(NoRun(), {}, [[1]], max_new_tokens=1, max_len=4097)
