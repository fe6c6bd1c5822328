"""A tiny random transformers DeepSeek-V4 with every layer kind, in FP32.

`python -m tests.support.hf_tiny OUT` writes config, weights and `golden.npz` (ids, logits, decode
logits). Needs torch and transformers; importing this module does not.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
PROMPT = 320  # two HCA windows and 80 CSA windows complete inside the prompt
DECODE_STEPS = 64  # crosses the next HCA boundary at position 383


def official_config() -> dict[str, Any]:
    """The model's config in the spelling of the official config.json.

    All of SWA, HCA and CSA layers, hash and score routers. 16 indexer heads because with few of
    them all ReLUs of an entry are often zero, and torch and XLA break such ties differently.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 128,
        "index_head_dim": 128,
        "index_n_heads": 16,
        "index_topk": 16,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 6,
        "num_hash_layers": 2,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": 2,
        "o_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "float32",
        "vocab_size": 256,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 128, 4, 4, 128, 0],
    }


def token_ids(length: int = PROMPT + DECODE_STEPS, seed: int = SEED) -> np.ndarray:
    """Random token ids `[length]`."""
    return np.random.default_rng(seed + 1).integers(0, official_config()["vocab_size"], length)


def build_model(seed: int = SEED) -> Any:
    """`DeepseekV4ForCausalLM` in FP32, every parameter and buffer random, none trivial."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.set_num_threads(1)  # tiny products: more threads only wait, for minutes on a busy machine
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config: Any = DeepseekV4Config(**official_config(), **options)
    model = DeepseekV4ForCausalLM(config).float().eval()
    rng = np.random.default_rng(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            if "inv_freq" not in name:
                value = _random(rng, name, tuple(tensor.shape), config.n_routed_experts)
                tensor.copy_(torch.from_numpy(value).to(tensor.dtype))
    return model


def _random(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], experts: int
) -> np.ndarray:
    """Values for one tensor: activations of about unit variance, large in front of the clamp."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("tid2eid"):
        return np.stack([rng.permutation(experts)[: shape[1]] for _ in range(shape[0])])
    if "norm" in name:
        return 1 + 0.2 * normal
    if name.endswith(("sinks", "e_score_correction_bias", "position_bias", "base")):
        return 0.5 * normal
    if name.endswith("scale"):
        return 1 + 0.2 * normal
    if name.endswith("embed_tokens.weight"):
        return normal
    normal /= np.sqrt(shape[-1])
    if name.endswith(
        ("gate_up_proj", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")
    ):
        return 5 * normal
    if name.endswith("down_proj") or name.endswith("down_proj.weight"):
        return 0.1 * normal
    return normal


def save(path: str | Path, seed: int = SEED, save_original_format: bool = True) -> Any:
    """Write config and weights with `save_pretrained` and return the model.

    With `save_original_format` (the default of transformers) leaf names are official with `model.`
    in front; without it they are module names (model.md section 7.2).
    """
    model = build_model(seed)
    model.save_pretrained(path, save_original_format=save_original_format)
    return model


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """One-shot logits `[t, V]` of `ids [t]`, no cache."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(ids)[None], use_cache=False).logits[0].float().numpy()


def decode_logits(model: Any, ids: np.ndarray, prompt: int = PROMPT) -> np.ndarray:
    """Logits `[len(ids) - prompt, V]` of single-token steps through the cache of transformers.

    Row `i` has seen `ids[: prompt + i + 1]`.
    """
    import torch

    tokens = torch.as_tensor(ids)[None]
    with torch.no_grad():
        cache = model(tokens[:, :prompt], use_cache=True).past_key_values
        rows = [
            model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            .logits[0, -1]
            .float()
            .numpy()
            for i in range(prompt, tokens.shape[1])
        ]
    return np.stack(rows)


# Module name (transformers 5.23) -> official name, inside `layers.N.` (model.md section 7.2).
_LAYER_NAMES = {
    "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.compressor.indexer.q_b_proj.": "attn.indexer.wq_b.",
    "self_attn.compressor.indexer.scorer.weights_proj.": "attn.indexer.weights_proj.",
    "self_attn.compressor.indexer.kv_proj.": "attn.indexer.compressor.wkv.",
    "self_attn.compressor.indexer.gate_proj.": "attn.indexer.compressor.wgate.",
    "self_attn.compressor.indexer.kv_norm.": "attn.indexer.compressor.norm.",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.kv_proj.": "attn.compressor.wkv.",
    "self_attn.compressor.gate_proj.": "attn.compressor.wgate.",
    "self_attn.compressor.kv_norm.": "attn.compressor.norm.",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.": "attn.wq_a.",
    "self_attn.q_a_norm.": "attn.q_norm.",
    "self_attn.q_b_proj.": "attn.wq_b.",
    "self_attn.kv_proj.": "attn.wkv.",
    "self_attn.kv_norm.": "attn.kv_norm.",
    "self_attn.o_a_proj.": "attn.wo_a.",
    "self_attn.o_b_proj.": "attn.wo_b.",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.": "ffn.gate.",
    "mlp.shared_experts.gate_proj.": "ffn.shared_experts.w1.",
    "mlp.shared_experts.down_proj.": "ffn.shared_experts.w2.",
    "mlp.shared_experts.up_proj.": "ffn.shared_experts.w3.",
}
_MODEL_NAMES = {
    "lm_head.weight": "head.weight",
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def official_weights(model: Any) -> dict[str, np.ndarray]:
    """The model's weights under official names, one entry per expert, FP32 (`tid2eid` int32)."""
    weights = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().numpy().copy()
        if name in _MODEL_NAMES:
            weights[_MODEL_NAMES[name]] = value
            continue
        if "inv_freq" in name:
            continue
        layer, leaf = name.removeprefix("model.layers.").split(".", 1)
        prefix = f"layers.{layer}."
        if leaf == "mlp.experts.gate_up_proj":
            for e, gate_up in enumerate(value):
                gate, up = np.split(gate_up, 2)
                weights[f"{prefix}ffn.experts.{e}.w1.weight"] = gate
                weights[f"{prefix}ffn.experts.{e}.w3.weight"] = up
        elif leaf == "mlp.experts.down_proj":
            for e, down in enumerate(value):
                weights[f"{prefix}ffn.experts.{e}.w2.weight"] = down
        else:
            old = next(old for old in _LAYER_NAMES if leaf.startswith(old))
            value = value.astype(np.int32) if leaf.endswith("tid2eid") else value
            weights[prefix + _LAYER_NAMES[old] + leaf.removeprefix(old)] = value
    return weights


def make(path: str | Path, seed: int = SEED, save_original_format: bool = True) -> np.ndarray:
    """Save the model with `golden.npz` beside it; return the one-shot logits of `token_ids()`."""
    model, ids = save(path, seed, save_original_format), token_ids(seed=seed)
    result = logits(model, ids)
    np.savez(
        Path(path) / "golden.npz",
        ids=ids,
        logits=result,
        prompt=PROMPT,
        decode_logits=decode_logits(model, ids),
    )
    return result


if __name__ == "__main__":
    make(sys.argv[1])
