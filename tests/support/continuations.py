"""Greedy continuations of training texts, for the last phases of `reference.train`.

    python -m tests.support.continuations --checkpoint DIR --library LIB --out FILE --seed 1

They are the model's own loops, which `reference.train run --own-loops FILE` trains it out of. The
script is not in `reference/`, which knows nothing of `dsv4_jax.generate`.
"""

import argparse
from pathlib import Path

import numpy as np

import dsv4_jax
from dsv4_jax.text import load_tokenizer
from reference.train import data


def prompts(checkpoint: Path, library: Path, seed: int, count: int) -> list[list[int]]:
    """Openings of 48 to 128 tokens, every other one from within a module of the library."""
    texts = data.read_library(library)
    names = [name for name in data.split(texts)["train"] if data.library_weight(name) == 2]
    rng = np.random.default_rng(seed)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ValueError(f"continuations: {checkpoint} has no tokenizer.json")
    found: list[list[int]] = []
    for i in rng.permutation(len(names)):
        ids = data.tokenize(tokenizer, texts[names[i]])[:-1]
        if len(ids) <= 400:
            continue
        start = 0 if len(found) % 2 else int(rng.integers(len(ids) - 200))
        found.append(ids[start : start + int(rng.integers(48, 129))].astype(int).tolist())
        if len(found) == count:
            break
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.continuations")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True, help="folder of the .py files")
    parser.add_argument("--out", type=Path, required=True, help="file for --own-loops")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="earlier files to append")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=320)
    options = parser.parse_args()
    begun = prompts(options.checkpoint, options.library, options.seed, options.count)
    model, params = dsv4_jax.from_checkpoint(options.checkpoint, precision="official")
    made = dsv4_jax.generate(model, params, begun, max_new_tokens=options.new_tokens)
    print("longest loops, times and period:", [data.longest_loop(list(row)) for row in made])
    rows = [np.array([*prompt, *row]) for prompt, row in zip(begun, made, strict=True)]
    sizes = [len(prompt) for prompt in begun]
    for path in options.also:
        with np.load(path) as file:
            rows = [*np.split(file["ids"], file["ends"][:-1]), *rows]
            sizes = [*file["prompts"].tolist(), *sizes]
    ends = np.cumsum([len(row) for row in rows])
    np.savez(options.out, ids=np.concatenate(rows), ends=ends, prompts=np.array(sizes))


if __name__ == "__main__":
    main()
