"""Command line of the training."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from reference.train.config import CONFIG


def prepare(options: argparse.Namespace) -> None:
    """Reads the library, writes the tokenizer, the lists of files and the tokens."""
    from reference.train import data

    texts = data.read_library(options.library)
    parts = data.split(texts)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = data.train_tokenizer((texts[n] for n in parts["train"]), CONFIG["vocab_size"])
    tokenizer.save(str(options.out / "tokenizer.json"), pretty=False)
    (options.out / "split.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    arrays: dict[str, np.ndarray] = {}
    for name in ("train", "dev", "held_out"):
        ids = [data.tokenize(tokenizer, texts[n]) for n in parts[name]]
        arrays[f"{name}_ids"] = np.concatenate(ids)
        arrays[f"{name}_ends"] = np.cumsum([len(x) for x in ids])
        arrays[f"{name}_bytes"] = np.array([len(texts[n].encode()) for n in parts[name]])
        print(
            f"{name}: {len(ids)} files, {arrays[f'{name}_bytes'].sum()} bytes, "
            f"{arrays[f'{name}_ends'][-1]} tokens"
        )
    arrays["train_repeats"] = np.array([data.library_weight(n) for n in parts["train"]])
    np.savez_compressed(options.out / "tokens.npz", allow_pickle=False, **arrays)


def run(options: argparse.Namespace) -> None:
    """Trains."""
    from reference.train.run import Plan, Text, train

    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(Plan)}
    plan = Plan(**{name: value for name, value in fields.items() if value is not None})
    train(
        CONFIG,
        plan,
        Text.load(options.data),
        options.out,
        resume=options.resume,
        weights=options.weights,
        own_loops=options.own_loops,
        until=options.until,
        seconds=options.seconds,
        save_every=options.save_every,
        evaluations=options.evaluations,
        greedy=not options.no_greedy,
        say=lambda line: print(line, flush=True),
    )


def export(options: argparse.Namespace) -> None:
    """Writes the checkpoint."""
    from reference.train.export import export

    size = export(CONFIG, options.run, options.data, options.out, master=options.master)
    print(f"{options.out}: model.safetensors has {size} bytes")


def plot(options: argparse.Namespace) -> None:
    """Draws the curve."""
    from reference.train.plot import plot

    plot(options.metrics, options.abandoned, options.out)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m reference.train")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare", help="tokens and tokenizer from a standard library")
    one.add_argument("--library", type=Path, required=True, help="folder of the .py files")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(call=prepare)
    one = commands.add_parser("run", help="train")
    one.add_argument("--data", type=Path, required=True, help="tokens.npz")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--resume", type=Path)
    one.add_argument("--weights", type=Path, help="folder of master-N.safetensors to start from")
    one.add_argument("--own-loops", type=Path, help="the model's continuations, for the loop rows")
    one.add_argument("--until", type=int)
    one.add_argument("--seconds", type=float, default=0, help="with --steps 0: all that fit")
    one.add_argument("--save-every", type=int, default=0)
    one.add_argument("--evaluations", type=int, default=10)
    one.add_argument("--no-greedy", action="store_true")
    from reference.train.run import Plan

    for field in dataclasses.fields(Plan):
        name = "--" + field.name.replace("_", "-")
        one.add_argument(
            name,
            type=type(field.default) if field.name != "steps" else int,
            required=field.name == "steps",
        )
    one.set_defaults(call=run)
    one = commands.add_parser("export", help="weights of a run as a checkpoint")
    one.add_argument("--data", type=Path, required=True, help="folder of tokenizer.json")
    one.add_argument("--run", type=Path, required=True, help="folder of master-N.safetensors")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--master", action="store_true", help="FP32, for comparison")
    one.set_defaults(call=export)
    one = commands.add_parser("plot", help="the curve of one or more runs")
    one.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl, in order")
    one.add_argument("--abandoned", type=Path, nargs="*", default=[])
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(call=plot)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
