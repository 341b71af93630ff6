"""Settings of ``scripts/evaluate.py``; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selva.utils.settings import required, setting

INPUT, NETWORKS, OUTPUT, GENERAL = "what is compared", "networks, each optional", "output", "general"


@dataclass(frozen=True)
class EvaluationConfig:
    """Sounds to compare, networks to compare them with, and where the figures go."""

    generated: Path = required("folder of generated sounds, such as the --output of infer.py", group=INPUT,
                               metavar="DIR")
    reference: Path = required("folder of the recordings; a generated sound is compared with the one of its name "
                               "(dog.flac with dog.wav, or with the sound of dog.mp4)", group=INPUT, metavar="DIR")
    videos: Path | None = setting(None, "folder of the videos, by the same names, for DeSync", group=INPUT,
                                  metavar="DIR", default_text="the videos in --reference")
    captions: Path | None = setting(None, "table with the columns id (or name) and caption, for the CLAP score",
                                    group=INPUT, metavar="FILE.tsv")
    synchformer: Path | None = setting(
        None, "synchformer_state_dict.pth, the whole file of 950 MB, for DeSync: how far sound and picture are apart",
        group=NETWORKS, metavar="FILE")
    clap: Path | None = setting(
        None, "folder of a CLAP model for transformers (such as laion/clap-htsat-unfused): score with the captions, "
        "Fréchet and kernel distance of its embeddings", group=NETWORKS, metavar="DIR")
    ast: Path | None = setting(
        None, "folder of an audio spectrogram transformer for transformers (such as "
        "MIT/ast-finetuned-audioset-10-10-0.4593): divergence of its classes, inception score, distances",
        group=NETWORKS, metavar="DIR")
    output_dir: Path = setting(Path("evaluation"), "folder of the results; a stopped evaluation goes on there",
                               group=OUTPUT, metavar="DIR")
    export_av_benchmark: Path | None = setting(
        None, "also write Synchformer's features as av-benchmark's cache folders: DIR/generated and DIR/reference",
        group=OUTPUT, metavar="DIR")
    device: str = setting("auto", "where the networks compute; auto takes a GPU if there is one", group=GENERAL,
                          metavar="auto|cpu|cuda|mps", shared=True)
