"""Write random weights of a published variant, at full size, in the published format and layout.

    python scripts/make_test_weights.py --variant small_16k --selva_dir test_weights

For testing and timing the whole way without downloading: every file that the variant needs, here or in ComfyUI-SelVA,
5.0 GB for small_16k. The networks run and produce noise. The same seed writes the same weights on every machine.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.models.clip_t5 import T5_EMBEDDING_COPY, meta_clip, meta_t5
from selva.models.random_weights import random_state_dict, random_tensor
from selva.models.variants import SYNCHFORMER, T5_TOKENIZER, VARIANTS, WEIGHT_FILES, Variant, get_variant
from selva.models.vocoder import FILTER_SUFFIXES, WEIGHT_NORM_SUFFIXES, AntiAliasedActivation, antialias_filter
from selva.models.zoo import build_generator, build_synchformer, build_vae, build_video_encoder, build_vocoder
from selva.utils.errors import UserError
from selva.utils.files import atomic_path, atomic_write_text
from selva.utils.torch_files import write_torch
from selva.weights.find import LAYOUTS, default_layout, local_path
from selva.weights.load import VOCODER_KEY

log = logging.getLogger("selva.make_test_weights")

README = "README.txt"
NOTICE = """RANDOM WEIGHTS, NOT A TRAINED MODEL

Written by scripts/make_test_weights.py for variant {variant} with seed {seed}. The files have the names, the tensors
and the layout of the published ones, so that everything can be tested and timed; what comes out is noise.
Delete this folder before downloading real weights.
"""


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--variant", required=True, choices=VARIANTS, metavar="NAME",
                        help=f"one of {', '.join(name for name, v in VARIANTS.items() if not v.packaged)}")
    parser.add_argument("--selva_dir", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--layout", choices=LAYOUTS, help="arrangement of the files; comfyui unless the folder differs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--debug", action="store_true", help="show debug messages and the traceback of an error")
    return parser


# -- tensors under their published names -------------------------------------------------------------------------------


def generator_tensors(variant: Variant, seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        template = build_generator(variant.generator)
    return random_state_dict(template, seed)


def video_encoder_tensors(variant: Variant, seed: int) -> dict[str, Tensor]:
    if variant.family == "mmaudio":
        return synchformer_tensors(variant, seed)
    with torch.device("meta"):
        template = build_video_encoder(variant.name)
    return random_state_dict(template, seed)


def synchformer_tensors(variant: Variant, seed: int) -> dict[str, Tensor]:
    """Return a Synchformer; its published file also holds an audio branch, which is not read."""
    with torch.device("meta"):
        template = build_synchformer(variant.video_encoder)
    stand_in = "afeat_extractor.stand_in.weight"
    return {**random_state_dict(template, seed), stand_in: random_tensor(stand_in, (4, 4), seed)}


def vae_tensors(variant: Variant, seed: int) -> dict[str, Tensor]:
    return random_state_dict(build_vae(variant.vae), seed)  # on the CPU, because its band statistics are constants


def vocoder_tensors(variant: Variant, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return a vocoder as published: convolutions as magnitude and direction, filters stored, all under one key."""
    with torch.device("meta"):
        template = build_vocoder(variant.vocoder)
    g_suffix, v_suffix = WEIGHT_NORM_SUFFIXES[0]
    tensors = {}
    for name, tensor in random_state_dict(template, seed).items():
        if tensor.ndim == 3:
            layer = name.removesuffix(".weight")
            tensors[layer + g_suffix] = torch.linalg.vector_norm(tensor, dim=(1, 2), keepdim=True)
            tensors[layer + v_suffix] = tensor
        else:
            tensors[name] = tensor
    taps = antialias_filter(torch.device("cpu"), torch.float32)[None, None]  # (1, 1, 12)
    for name, module in template.named_modules():
        if isinstance(module, AntiAliasedActivation):
            tensors.update({name + suffix: taps.clone() for suffix in FILTER_SUFFIXES})
    return {VOCODER_KEY: tensors}


def half_precision(template: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return random weights for a network on the meta device, in float16 to save half of the disk space."""
    return {name: tensor.half() for name, tensor in random_state_dict(template, seed).items()}


def t5_tensors(variant: Variant, seed: int) -> dict[str, Tensor]:
    assert variant.t5 is not None, variant.name
    tensors = half_precision(meta_t5(variant.t5), seed)
    del tensors[T5_EMBEDDING_COPY]  # the published file stores the shared table once
    return tensors


def stand_in_tokenizer(path: Path) -> None:
    """Write a ``tokenizer.json`` that splits texts into bytes; padding and end have T5's numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


# -- files -------------------------------------------------------------------------------------------------------------


def write_part(variant: Variant, part: str, path: Path, seed: int) -> None:
    """Write the weight file of one part; the image tower of CLIP is in the file of the text tower.

    ``part`` may also be the name of the Synchformer file, which is no part of SelVA variants.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    make = {
        "generator": generator_tensors,
        "video_encoder": video_encoder_tensors,
        SYNCHFORMER: synchformer_tensors,
        "vae": vae_tensors,
        "vocoder": vocoder_tensors,
        "clip_text": lambda variant, seed: half_precision(meta_clip(variant.clip), seed),
        "t5": t5_tensors,
    }[part]
    tensors = make(variant, seed)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:
                raise UserError(f"{path}: cannot be written ({error}); make room, or choose another --selva_dir"
                                ) from error
            temporary.chmod(0o644)  # the library makes files that only their owner may read
        else:
            write_torch(tensors, temporary)


def write_weights(variant: Variant, selva_dir: Path, layout: str, seed: int) -> list[Path]:
    """Write every file of a variant and return their paths."""
    selva_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(selva_dir / README, NOTICE.format(variant=variant.name, seed=seed))
    paths = []
    for part in variant.parts:
        if part == "clip_image":
            continue
        path = local_path(variant.weight_files(part)[0], selva_dir, layout)
        write_part(variant, part, path, seed)
        log.info("%s: %.2f GB", part, path.stat().st_size / 1e9)
        paths.append(path)
    if variant.family == "selva":  # not read here, but the loader of ComfyUI-SelVA asks for it with every variant
        path = local_path(WEIGHT_FILES[SYNCHFORMER], selva_dir, layout)
        write_part(variant, SYNCHFORMER, path, seed)
        log.info("%s, for ComfyUI-SelVA only: %.2f GB", SYNCHFORMER, path.stat().st_size / 1e9)
        paths.append(path)
    if variant.t5 is not None:
        path = local_path(T5_TOKENIZER, selva_dir, layout)
        with atomic_path(path) as temporary:
            stand_in_tokenizer(temporary)
        paths.append(path)
    return paths


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    variant = get_variant(args.variant)
    if variant.packaged:
        raise cli.UsageError(f"--variant {variant.name} is built in and needs no weight files")
    if args.selva_dir.is_dir() and any(args.selva_dir.iterdir()) and not (args.selva_dir / README).exists():
        raise UserError(f"{args.selva_dir} holds other files; random weights go into an empty folder, or their own")
    for path in write_weights(variant, args.selva_dir, args.layout or default_layout(args.selva_dir), args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
