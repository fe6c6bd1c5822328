"""Which number format each part of the model is stored and multiplied in.

A linear's format names its weight storage and its activation in one word:

=================  =======================================  ====================================
word               weight                                   activation
=================  =======================================  ====================================
``float32``        FP32                                     FP32
``bfloat16``       BF16                                     BF16
``fp8_w8a8``       E4M3, UE8M0 per 128x128                  E4M3, UE8M0 per token and 128 inputs
``fp8_w8a16``      E4M3, UE8M0 per 128x128                  BF16
``mxfp4_w4a8``     E2M1, UE8M0 per 32 inputs                E4M3, UE8M0 per token and 128 inputs
``mxfp4_w4a16``    E2M1, UE8M0 per 32 inputs                BF16
``nvfp4_w4a4``     E2M1, E4M3 per 16 inputs, FP32 global    E2M1, E4M3 per 16, FP32 per token
``nvfp4_w4a8``     E2M1, E4M3 per 16 inputs, FP32 global    E4M3, UE8M0 per token and 128 inputs
``nvfp4_w4a16``    E2M1, E4M3 per 16 inputs, FP32 global    BF16
=================  =======================================  ====================================

Routed experts in ``nvfp4_w4a4`` take a static scale per expert instead of one per token where the
checkpoint has them.

Sources: model.md sections 4.5, 4.6 and 9 (formats), 3.6 (``wo_a`` keeps BF16 activations).
"""

import dataclasses
from typing import Final, Literal, cast, get_args

__all__ = [
    "ACT_SCALES",
    "LINEAR_FORMATS",
    "PRESETS",
    "SCALE_LEAVES",
    "ActFormat",
    "LinearFormat",
    "Precision",
    "Regime",
    "WeightFormat",
    "act_format",
    "weight_format",
]

LinearFormat = Literal[
    "float32",
    "bfloat16",
    "fp8_w8a8",
    "fp8_w8a16",
    "mxfp4_w4a8",
    "mxfp4_w4a16",
    "nvfp4_w4a4",
    "nvfp4_w4a8",
    "nvfp4_w4a16",
]
ActFormat = Literal["nvfp4", "fp8", "bfloat16"]
Regime = Literal["decode", "prefill", "exact"]
WeightFormat = Literal["float32", "bfloat16", "fp8", "mxfp4", "nvfp4"]

LINEAR_FORMATS: Final[tuple[str, ...]] = get_args(LinearFormat)
SCALE_LEAVES: Final[dict[WeightFormat, tuple[str, ...]]] = {
    "float32": (),
    "bfloat16": (),
    "fp8": ("scale",),
    "mxfp4": ("scale",),
    "nvfp4": ("block_scale", "global_scale"),
}
"""What a linear has beside its ``weight``, in the order in which ops take it."""
ACT_SCALES: Final = {"w1": "up_act_scale", "w2": "down_act_scale"}
"""Weight of the routed experts -> leaf with the static scales of its activations, if there are any.

It lies beside the weights; ``w3`` shares that of ``w1``."""
_CHOICES: Final[dict[str, tuple[str | bool | None, ...]]] = {
    "experts_power_of_two": (None, True, False),
    "kv": ("fp8", "bfloat16", "float32"),
    "index_keys": ("mxfp4", "fp8", "bfloat16", "float32"),
    "dense": ("bfloat16", "float32"),
    "index_scores": ("float32", "bfloat16"),
    "q_norm": ("bfloat16", "float32"),
    "streams": ("bfloat16", "float32"),
    "regime": (None, *get_args(Regime)),
}


def weight_format(linear: LinearFormat) -> WeightFormat:
    """The storage half of a linear's format: ``"fp8_w8a16"`` -> ``"fp8"``."""
    return cast(WeightFormat, linear.split("_")[0])


def act_format(linear: LinearFormat) -> ActFormat:
    """The activation half: ``"nvfp4_w4a4"`` -> ``"nvfp4"``; unquantised formats: ``bfloat16``."""
    formats: dict[str, ActFormat] = {"a4": "nvfp4", "a8": "fp8"}
    return formats.get(linear[-2:], "bfloat16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """One named field per choice of number format; hashable, so usable as a static argument.

    Attributes:
        experts: routed experts ``w1``, ``w2``, ``w3`` (main layers).
        shared_expert: the shared expert.
        wq_a, wq_b, wkv, wo_a, wo_b, indexer_wq_b: the attention linears.
        mtp_experts: routed experts of the multi-token-prediction module.
        experts_power_of_two: whether all block scales of the routed experts in ``nvfp4_w4a8``, be
            they ``experts`` or ``mtp_experts``, are zero or powers of two, as those of a lossless
            cast from MXFP4 are; on a GPU their products then run on FP8 tensor cores (`moe`).
            ``None``: `from_checkpoint` looks, and the model that it returns has the answer; any
            other model takes it for ``False``. ``True`` is checked at load, ``False`` is not.
        mtp_proj: ``e_proj`` and ``h_proj`` of that module.
        dense: the linears that the release keeps unquantised (embedding, head, router,
            compressor projections, ``weights_proj``, norm weights): ``bfloat16`` | ``float32``.
        kv: window and compressed entries: ``fp8`` (448 E4M3 + UE8M0 per 64 + 64 BF16) |
            ``bfloat16`` | ``float32``.
        index_keys: indexer queries and keys: ``mxfp4`` (per 32, after a Hadamard transform) |
            ``fp8`` (one power-of-two scale per 128) | ``bfloat16`` | ``float32``.
        index_scores: ``float32``, or ``bfloat16`` to round the indexer's products, terms and sums
            as the official code does (for comparison with it; makes ties common).
        q_norm: ``bfloat16`` rounds every step of the per-head query norm as the official code
            does, ``float32`` rounds once.
        streams: residual streams and every activation between ops: ``bfloat16`` | ``float32``.
            In BF16 (and with ``dense`` in BF16) hyper-connections and the norms behind them are
            one foreign call, in FP32 plain `jax.numpy` (`model.hc.is_fused`).
        regime: pins the kernels of linears, experts, attention and hyper-connections on a GPU.
            ``decode``: thread blocks share the inputs of a row where the weight has few rows;
            ``prefill``: one sums them all; ``None`` chooses by the number of tokens in the call.
            Both multiply E4M3 by E4M3 on FP8 tensor cores, which keep about 14 bits of 128 inputs'
            sum. ``exact`` sums as ``decode`` does, on BF16 tensor cores: slower for many tokens,
            and as exact as FP32 sums are. Inside one regime a row has the same bits whatever the
            call holds; on the CPU always. The ops that are not foreign calls are XLA's, which picks
            its kernels by shape on a GPU.

    Raises:
        ValueError: a field holds a value that is not among its choices, or
            ``experts_power_of_two`` is ``True`` without experts in ``nvfp4_w4a8``.
    """

    experts: LinearFormat = "mxfp4_w4a8"
    shared_expert: LinearFormat = "fp8_w8a8"
    wq_a: LinearFormat = "fp8_w8a8"
    wq_b: LinearFormat = "fp8_w8a8"
    wkv: LinearFormat = "fp8_w8a8"
    wo_a: LinearFormat = "fp8_w8a16"
    wo_b: LinearFormat = "fp8_w8a8"
    indexer_wq_b: LinearFormat = "fp8_w8a8"
    mtp_experts: LinearFormat = "mxfp4_w4a8"
    mtp_proj: LinearFormat = "fp8_w8a8"
    experts_power_of_two: bool | None = None
    dense: Literal["bfloat16", "float32"] = "bfloat16"
    kv: Literal["fp8", "bfloat16", "float32"] = "fp8"
    index_keys: Literal["mxfp4", "fp8", "bfloat16", "float32"] = "mxfp4"
    index_scores: Literal["float32", "bfloat16"] = "float32"
    q_norm: Literal["bfloat16", "float32"] = "bfloat16"
    streams: Literal["bfloat16", "float32"] = "bfloat16"
    regime: Regime | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = _CHOICES.get(field.name, LINEAR_FORMATS)
            # 1 is not True.
            known = value in choices if isinstance(value, str) else any(value is c for c in choices)
            if not known:
                raise ValueError(
                    f"Precision: {field.name} must be one of {list(choices)}, got {value!r}"
                )
        if self.experts_power_of_two and "nvfp4_w4a8" not in (self.experts, self.mtp_experts):
            raise ValueError(
                "Precision: experts_power_of_two is of nvfp4_w4a8 alone, got experts "
                f"{self.experts!r} and mtp_experts {self.mtp_experts!r}"
            )

    @classmethod
    def preset(cls, name: str) -> "Precision":
        """The preset called ``name``.

        ``official``: as trained. ``nvfp4_experts``: NVFP4 weights and activations in the routed
        experts, the rest as trained. ``nvfp4``: the same in the shared expert and the attention
        linears too. ``fp8``: FP8 in the routed experts as in the rest (the ``-Base`` releases).
        ``bfloat16``: unquantised BF16 checkpoints. ``float32``: everything in FP32, no quantisation
        simulated.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"Precision: preset must be one of {list(PRESETS)}, got {name!r}")
        return PRESETS[name]


def _uniform(dtype: Literal["bfloat16", "float32"]) -> Precision:
    return Precision(
        experts=dtype,
        shared_expert=dtype,
        wq_a=dtype,
        wq_b=dtype,
        wkv=dtype,
        wo_a=dtype,
        wo_b=dtype,
        indexer_wq_b=dtype,
        mtp_experts=dtype,
        mtp_proj=dtype,
        dense=dtype,
        kv=dtype,
        index_keys=dtype,
        q_norm=dtype,
        streams=dtype,
    )


PRESETS: Final[dict[str, Precision]] = {
    "official": Precision(),
    "nvfp4_experts": Precision(experts="nvfp4_w4a4"),
    "fp8": Precision(experts="fp8_w8a8", mtp_experts="fp8_w8a8"),
    "nvfp4": Precision(
        experts="nvfp4_w4a4",
        shared_expert="nvfp4_w4a4",
        wq_a="nvfp4_w4a4",
        wq_b="nvfp4_w4a4",
        wkv="nvfp4_w4a4",
        wo_a="nvfp4_w4a4",
        wo_b="nvfp4_w4a4",
        indexer_wq_b="nvfp4_w4a4",
    ),
    "bfloat16": _uniform("bfloat16"),
    "float32": _uniform("float32"),
}
