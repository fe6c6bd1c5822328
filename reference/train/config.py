"""The architecture of the small model: every part of V4, its real sizes per head, small widths."""

from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_ratios": [0, 0, 4, 128, 0, 0],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 128,
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
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
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1536,
}


def kind(config: dict[str, Any], name: str) -> str:
    """How the official release stores a tensor: `fp8`, `mxfp4`, `bf16`, `f32` or `i64` (7.1)."""
    leaf = name.split(".", 2)[-1] if name.startswith(("layers.", "mtp.")) else name
    if leaf.endswith("tid2eid"):
        return "i64"
    if "hc_" in leaf or leaf.endswith(("attn_sink", "ape", "gate.bias")):
        return "f32"
    if ".experts." in leaf:
        return "mxfp4"
    fp8 = ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "e_proj", "h_proj", "w1", "w2", "w3")
    if any(leaf.removesuffix(".weight").endswith(part) for part in fp8):
        return "fp8"
    return "bf16"


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor by its official name, without scales; the experts of a layer are stacked.

    `layers.N.ffn.experts.w1 [e, i, dim]` stands for `layers.N.ffn.experts.E.w1.weight`.
    """
    dim, vocab, hc = config["hidden_size"], config["vocab_size"], config["hc_mult"]
    heads, d, rank = config["num_attention_heads"], config["head_dim"], config["q_lora_rank"]
    groups, o_rank = config["o_groups"], config["o_lora_rank"]
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    mixes = 2 * hc + hc * hc
    out: dict[str, tuple[int, ...]] = {
        "embed.weight": (vocab, dim),
        "head.weight": (vocab, dim),
        "norm.weight": (dim,),
        "hc_head_fn": (hc, hc * dim),
        "hc_head_base": (hc,),
        "hc_head_scale": (1,),
    }

    def compressor(prefix: str, m: int, size: int) -> None:
        channels = (2 if m == 4 else 1) * size
        out[prefix + "wkv.weight"] = (channels, dim)
        out[prefix + "wgate.weight"] = (channels, dim)
        out[prefix + "ape"] = (m, channels)
        out[prefix + "norm.weight"] = (size,)

    def layer(prefix: str, m: int, hashed: bool) -> None:
        for branch in ("attn", "ffn"):
            out[f"{prefix}{branch}_norm.weight"] = (dim,)
            out[f"{prefix}hc_{branch}_fn"] = (mixes, hc * dim)
            out[f"{prefix}hc_{branch}_base"] = (mixes,)
            out[f"{prefix}hc_{branch}_scale"] = (3,)
        out[prefix + "attn.wq_a.weight"] = (rank, dim)
        out[prefix + "attn.q_norm.weight"] = (rank,)
        out[prefix + "attn.wq_b.weight"] = (heads * d, rank)
        out[prefix + "attn.wkv.weight"] = (d, dim)
        out[prefix + "attn.kv_norm.weight"] = (d,)
        out[prefix + "attn.attn_sink"] = (heads,)
        out[prefix + "attn.wo_a.weight"] = (groups * o_rank, heads * d // groups)
        out[prefix + "attn.wo_b.weight"] = (dim, groups * o_rank)
        if m:
            compressor(prefix + "attn.compressor.", m, d)
        if m == 4:
            out[prefix + "attn.indexer.wq_b.weight"] = (index_heads * index_dim, rank)
            out[prefix + "attn.indexer.weights_proj.weight"] = (index_heads, dim)
            compressor(prefix + "attn.indexer.compressor.", m, index_dim)
        out[prefix + "ffn.gate.weight"] = (experts, dim)
        if hashed:
            out[prefix + "ffn.gate.tid2eid"] = (vocab, config["num_experts_per_tok"])
        else:
            out[prefix + "ffn.gate.bias"] = (experts,)
        for stack, lead in (("experts", (experts,)), ("shared_experts", ())):
            end = "" if lead else ".weight"
            out[f"{prefix}ffn.{stack}.w1{end}"] = (*lead, width, dim)
            out[f"{prefix}ffn.{stack}.w2{end}"] = (*lead, dim, width)
            out[f"{prefix}ffn.{stack}.w3{end}"] = (*lead, width, dim)

    for i in range(config["num_hidden_layers"]):
        layer(f"layers.{i}.", config["compress_ratios"][i], i < config["num_hash_layers"])
    if config["num_nextn_predict_layers"]:
        layer("mtp.0.", 0, False)
        for name in ("e_proj", "h_proj"):
            out[f"mtp.0.{name}.weight"] = (dim, dim)
        for name in ("enorm", "hnorm", "norm"):
            out[f"mtp.0.{name}.weight"] = (dim,)
        for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
            out["mtp.0." + name] = out[name]
    return out


BITS = {"fp8": 8 + 8 / 128**2, "mxfp4": 4.25, "bf16": 16, "f32": 32, "i64": 64}


def stored_bytes(config: dict[str, Any]) -> int:
    """Bytes of all tensors in the official format, without the header of the file."""
    size = 0.0
    for name, shape in shapes(config).items():
        count = 1
        for n in shape:
            count *= n
        size += count * BITS[kind(config, name)] / 8
    return round(size)
