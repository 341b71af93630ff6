#!/usr/bin/env python3
"""Look at finished adapters, convert them, and make new ones of them.

    python scripts/adapter.py info runs/dog/adapter_final.pt
    python scripts/adapter.py convert runs/dog/adapter_final.pt --to peft --output dog_peft
    python scripts/adapter.py merge dog.pt:0.8 door.pt:0.5 --output both.pt
    python scripts/adapter.py resize dog.pt --energy 0.99 --output small.pt
    python scripts/adapter.py soup seed1.pt seed2.pt seed3.pt --output soup.pt
    python scripts/adapter.py bake dog.pt --variant small_16k --selva_dir weights --output weights_dog
    python scripts/adapter.py extract --tuned tuned.pth --base weights --variant small_16k --rank 32 --output tuned.pt
    python scripts/adapter.py diff dog.pt dog_longer.pt
    python scripts/adapter.py check dog.pt --variant small_16k

Reads adapters of train_lora.py, ComfyUI-SelVA, PEFT (a folder), MMAudio-Lora and kohya. docs/adapters.md says more.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.models.variants import VARIANTS, get_variant
from selva.utils.errors import UsageError, UserError
from selva.utils.text import counted

if TYPE_CHECKING:
    from selva.lora.merge import Adapter
    from selva.lora.tools import Cut

log = logging.getLogger("selva.adapter")

FORMATS = ("selva", "comfyui", "peft", "kohya")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    group = parser.add_argument_group("what to do")
    group.add_argument("command", choices=tuple(COMMANDS), help="see above")
    group.add_argument("files", nargs="*", metavar="FILE", help="adapters; for merge and bake FILE:STRENGTH, default 1")
    group.add_argument("--output", type=Path, help="file to write; a folder for --to peft; bake takes either: a "
                       "folder, in which the generator gets its published name, or a .pth or .safetensors")
    group.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    group.add_argument("--to", choices=FORMATS, default="selva", help="format of the output")
    group.add_argument("--rank", type=cli.positive_int, help="rank to keep in every layer")
    group.add_argument("--energy", type=float, help="keep this share of every update, e.g. 0.99, with the lowest rank "
                                                    "that does")
    group.add_argument("--fold", action="store_true", help="take scales that differ between layers into the matrices "
                       "even where that rounds them")
    group.add_argument("--tuned", type=Path, help="extract: the fine-tuned generator, a file or a folder of weights")
    group.add_argument("--base", type=Path, help="extract: the generator that it was tuned from; bake and check: a "
                       "generator of your own that the adapters are for")
    group.add_argument("--layers", action="store_true", help="info and diff: a line for every layer")
    group = parser.add_argument_group("base model")
    group.add_argument("--variant", choices=tuple(VARIANTS), help="base model, where the adapters do not say it")
    group.add_argument("--selva_dir", type=Path, help="its weights, which PiSSA as published and bake need")
    parser.add_common(seed=False, device=False)
    return parser


def output_of(args: argparse.Namespace) -> Path:
    """Return the output, which must be given and free."""
    if args.output is None:
        last = args.files[-1] if len(args.files) > 1 else ""
        there = Path(last).exists() or Path(last.rpartition(":")[0] or last).exists()  # the latter without a strength
        meant = last and (args.command in ("convert", "resize") or not there)  # these two take one adapter
        raise UsageError(f"{args.command} writes a file: give --output" + (f" {shlex.quote(last)}" if meant else ""))
    if args.output.exists() and not args.overwrite and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise UsageError(f"{args.output}: is there already; name another --output, or replace it with --overwrite")
    from selva.weights.adapters import check_ending

    if args.command != "bake":
        check_ending(args.output, args.to)
    elif args.output.suffix in (".pt", ".bin", ".ckpt"):
        raise UsageError(f"{args.output}: a generator is written as .pth or .safetensors, or into a folder")
    return args.output


def need_files(args: argparse.Namespace, least: int, most: float = math.inf) -> list[str]:
    """Return the adapters of the command line, checked for their number."""
    if not least <= len(args.files) <= most:
        wanted = ("" if least == most else "at least ") + counted(least, "adapter")
        raise UsageError(f"{args.command} takes {wanted}, got {len(args.files)}")
    return args.files


def opened(args: argparse.Namespace, path: Path, plain: bool = False) -> Adapter:
    """Return an adapter; with ``plain``, one that was published with changed base weights as an ordinary one."""
    from selva.lora.tools import without_pissa
    from selva.weights.adapters import generator_tensors, open_adapter

    adapter = open_adapter(path, args.variant, args.fold, any_variant=args.command == "check")
    if not plain or not adapter.is_pissa:
        return adapter
    variant = adapter.meta.get("variant")
    packaged = variant is not None and get_variant(variant).packaged
    if variant is None or (args.selva_dir is None and not packaged):
        raise UserError(f"{path}: holds changed base weights (PiSSA as published); give the --variant and the "
                        "--selva_dir of its base model, with which it becomes an ordinary adapter")
    adapter, lost = without_pissa(adapter, generator_tensors(None if packaged else args.selva_dir, variant))
    log.warning("%s: its changed base weights became an ordinary adapter of rank %d; %.1g of the length of a weight, "
                "their rounding, is left out", path, adapter.meta["rank"], lost)
    return adapter


def write_cut(args: argparse.Namespace, cut: Cut, cuts: bool) -> int:
    """Write an adapter that was made, and say what of it was kept."""
    from selva.weights.adapters import write_adapter

    for line in cut.left_out:
        log.warning("left out, as an adapter has no place for it: %s", line)
    if cuts:
        for name, energy in cut.energy.items():
            print(f"{name}\trank {cut.ranks[name]}\tenergy kept {energy:.6f}")
        worst = min(cut.energy, key=lambda name: cut.energy[name])
        log.info("least energy kept: %.4f in %s", cut.energy[worst], worst)
    print(write_adapter(cut.adapter, output_of(args), args.to))
    return 0


def for_each(args: argparse.Namespace, look: Callable[[str, Adapter], bool]) -> int:
    """Look at every adapter and return the exit code; one that cannot be read does not hide those behind it.

    Args:
        look: given the file as it was named and its adapter; returns whether all is well with it.
    """
    failed = False
    for text in need_files(args, 1):
        try:
            failed |= not look(text, opened(args, Path(text)))
        except (OSError, UserError) as error:
            log.error("%s", error)
            failed = True
    return cli.EXIT_FAILED if failed else 0


def info(args: argparse.Namespace) -> int:
    from selva.lora.tools import layer_numbers
    from selva.weights.adapters import loads_here, where_it_loads
    from selva.weights.find import generator_change

    def look(text: str, adapter: Adapter) -> bool:
        numbers, meta = layer_numbers(adapter), adapter.meta
        kinds = [kind for kind, is_so in (
            ("PiSSA as published", adapter.is_pissa),
            ("DoRA", any(key.endswith(".lora_magnitude") for key in adapter.tensors)),
            ("convolutions", any(value.dim() == 3 for value in adapter.tensors.values()))) if is_so]
        print(f"{text}: LoRA{' with ' + ' and '.join(kinds) if kinds else ''} on {counted(len(numbers), 'layer')}")
        change = generator_change(meta, None)
        own = f", with --generator {change[0]}" if change else ""
        print(f"  base model: {meta.get('variant') or 'not said'}{own}")
        used, norms = [n.used_rank for n in numbers.values()], [n.norm for n in numbers.values()]
        print(f"  rank {meta.get('rank')}, directions that change something: {min(used)} to {max(used)}; "
              f"update norms {min(norms):.3g} to {max(norms):.3g}")
        trained = {key: meta[key] for key in ("steps", "num_clips", "prompt_prefix", "clip_features", "preserve",
                                              "init_from", "merged_from", "resized_from") if meta.get(key)}
        print("  trained: " + (", ".join(f"{key} {value}" for key, value in trained.items()) or "not said"))
        for line in where_it_loads(adapter, loads_here(Path(text))):
            print(f"  {line}")
        for name, n in numbers.items() if args.layers else ():
            print(f"  {name}\trank {n.rank}\tused {n.used_rank}\tnorm {n.norm:.4g}")
        return True

    return for_each(args, look)


def convert(args: argparse.Namespace) -> int:
    from selva.weights.adapters import write_adapter

    (text,) = need_files(args, 1, 1)
    print(write_adapter(opened(args, Path(text), plain=True), output_of(args), args.to))
    return 0


def merge(args: argparse.Namespace) -> int:
    from selva.lora.tools import combine_adapters
    from selva.weights.adapters import parse_strength

    pairs = [(opened(args, path, plain=True), s) for path, s in map(parse_strength, need_files(args, 1))]
    cut = combine_adapters(pairs, args.rank, args.energy)
    return write_cut(args, cut, cuts=args.rank is not None or args.energy is not None)


def resize(args: argparse.Namespace) -> int:
    from selva.lora.tools import resize_adapter

    (text,) = need_files(args, 1, 1)
    if (args.rank is None) == (args.energy is None):
        raise UsageError("resize takes --rank or --energy")
    return write_cut(args, resize_adapter(opened(args, Path(text), plain=True), args.rank, args.energy), cuts=True)


def soup(args: argparse.Namespace) -> int:
    from selva.lora.tools import soup as soup_of

    made = soup_of([opened(args, Path(text), plain=True) for text in need_files(args, 1)], args.rank)
    return write_cut(args, made, cuts=True)


def bake(args: argparse.Namespace) -> int:
    from selva.weights.adapters import bake as bake_into
    from selva.weights.adapters import baked_with, parse_strength

    pairs = [(opened(args, path), strength) for path, strength in map(parse_strength, need_files(args, 1))]
    variants = {adapter.meta["variant"] for adapter, _ in pairs if adapter.meta.get("variant") is not None}
    if len(variants) != 1:
        raise UsageError(f"bake needs one base model, got {sorted(variants) or 'none'}; give --variant")
    variant = variants.pop()
    path, _ = bake_into(variant, args.selva_dir, pairs, output_of(args), args.base)
    clip_features = baked_with(pairs, args.base)
    log.info("to use it: --variant %s --generator %s%s", variant, shlex.quote(str(path)),
             f" --clip_features {clip_features}" if clip_features else "")
    print(path)
    return 0


def extract(args: argparse.Namespace) -> int:
    from selva.lora.tools import extract_adapter
    from selva.weights.adapters import extracted_meta, generator_tensors, layer_shapes

    if args.tuned is None or args.variant is None or args.rank is None:
        raise UsageError("extract takes --tuned, --variant and --rank, and --base for a model that is not built in")
    if args.base is None and not VARIANTS[args.variant].packaged:
        raise UsageError(f"extract needs the generator that was tuned: --base, a file or a folder with {args.variant}")
    output_of(args)  # before minutes of work
    tuned, base = generator_tensors(args.tuned, args.variant), generator_tensors(args.base, args.variant)
    meta = extracted_meta(args.tuned, args.base, args.variant)
    cut = extract_adapter(tuned, base, list(layer_shapes(args.variant)), args.rank, meta)
    return write_cut(args, cut, cuts=True)


def diff(args: argparse.Namespace) -> int:
    from selva.lora.tools import compare_adapters

    first, second = (opened(args, Path(text), plain=True) for text in need_files(args, 2, 2))
    rows = compare_adapters(first, second)
    for name, r in rows.items() if args.layers else ():
        print(f"{name}\tnorms {r.norm_a:.4g} {r.norm_b:.4g}\tdifference {r.difference:.4g}\tcosine {r.cosine:.4f}")
    norm_a, norm_b, gap = (math.hypot(*(getattr(row, key) for row in rows.values()))
                           for key in ("norm_a", "norm_b", "difference"))
    inner = sum(row.cosine * row.norm_a * row.norm_b for row in rows.values())
    cosine = inner / (norm_a * norm_b) if norm_a and norm_b else 0.0
    print(f"all {counted(len(rows), 'layer')}: norms {norm_a:.4g} {norm_b:.4g}, difference {gap:.4g}, cosine "
          f"{cosine:.4f}")
    return 0


def check(args: argparse.Namespace) -> int:
    from selva.weights.adapters import adapter_problems, generator_file
    from selva.weights.find import generator_change

    if args.variant is None:
        raise UsageError("check takes the --variant that the adapter is to be used with")
    base = None if args.base is None else generator_file(args.base, args.variant)

    def look(text: str, adapter: Adapter) -> bool:
        problems = adapter_problems(adapter, args.variant)
        for problem in problems:
            log.error("%s: %s", text, problem)
        if change := generator_change(adapter.meta, base):
            log.warning("%s: was trained on %s and is checked for %s (--base), with which it sounds different", text,
                        *change)
        print(f"{text}: {'does not fit' if problems else 'fits'} {args.variant}")
        return not problems

    return for_each(args, look)


COMMANDS = {one.__name__: one for one in (info, convert, merge, resize, soup, bake, extract, diff, check)}


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command in ("convert", "merge", "resize", "soup", "bake"):  # before minutes of work
        output_of(args)
    return COMMANDS[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
