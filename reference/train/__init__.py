"""Training of the small model that ships with `dsv4_jax`, on the reference's own ops.

    python -m reference.train prepare --library LIB --out FOLDER     tokens and tokenizer
    python -m reference.train run --data FOLDER/tokens.npz --out FOLDER --steps N
    python -m reference.train export --data FOLDER --run FOLDER --out FOLDER

This folder alone of `reference/` may use optax, tokenizers, safetensors and `dsv4_jax.quant`.
"""
