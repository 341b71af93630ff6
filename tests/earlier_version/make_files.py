"""Make ``files/``: small files of every kind that a user may have on the disk, as one version of the code writes them.

The files beside this script are of version 0.1.0, commit eabb59f. They show that later code reads what that version
has written and goes on with it, so do not make them again with later code; make a second folder if formats change.

    cd CHECKOUT && OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/earlier_version/make_files.py OUT

Whichever ``selva`` and scripts are on the path write the files, from within OUT and with relative paths only, because
manifests and settings files hold the paths that they were given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from make_media import make_video

import extract_features
import infer
import selva
import train_lora
from selva import load_adapter, merge_adapter
from selva.checkpoint import save_adapter

TINY = ["--variant", "tiny_16k", "--device", "cpu"]
LONG_AGO = 10**18  # nanoseconds: the time of the sounds, which the cache of the features remembers
QKV, CONV = "fused_blocks.1.attn.qkv", "fused_blocks.1.linear1"

INTERRUPTED = [*(f"videos/clip_{number}.mkv" for number in range(4)), "--output_dir", "interrupted", "--prompt",
               "a knock on wood", "--workers", "0", *TINY]
MEMMAP = ["long", "--output_dir", "memmap/set", "--format", "memmap", "--prompt", "a gong", "--workers", "0", *TINY]
SOUND_SET = ["sounds/clips.tsv", "--recordings", "sounds", "--captions", "sounds/captions.tsv", "--output_dir",
             "interrupted_set/set", "--workers", "0", *TINY]
RUN = ["--data_dir", "features", "--output_dir", "run", "--steps", "6", "--save_every", "3", "--val_every", "3",
       "--log_every", "1", "--batch_size", "2", "--grad_accum", "2", "--rank", "2", "--target",
       "joint_blocks.0.latent_block.attn.qkv", f"{CONV}:1", "--lora_dropout", "0.1", "--ema_decay", "0.9", "--lr",
       "0.01", "--warmup_steps", "2", "--lr_schedule", "cosine", "--lora_plus_ratio", "2", "--duration", "1.2",
       "--seed", "7", "--precision", "fp32", "--no_preview", *TINY]
GENERATED = ["--features", "features/clip_0.npz", "--adapter", "adapters/dora.pt", "--strength", "0.5", "--duration",
             "1", "--num_steps", "4", "--precision", "fp32", "--output", "generated", *TINY]
ADAPTERS = {  # what makes each kind
    "plain": ["--rank", "1", "--target", QKV],
    "alpha": ["--rank", "2", "--alpha", "3", "--target", QKV],
    "rslora": ["--rank", "4", "--rslora", "--target", QKV],
    "pissa": ["--rank", "1", "--init", "pissa", "--target", QKV],
    "dora": ["--rank", "1", "--dora", "--target", QKV],
    "convolution": ["--rank", "1", "--target", CONV],
    "ranks": ["--rank", "1", "--target", QKV, "fused_blocks.0.attn.qkv:2"],
    "dora_convolution": ["--rank", "1", "--dora", "--target", CONV],
}
AS_SAFETENSORS = ("plain", "dora_convolution")
WITH_STEP_FILE = ("dora", "pissa")  # whose step files hold more than the two factors


def call(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    code = main(arguments)
    assert code == 0, (code, arguments)


# -- inputs -----------------------------------------------------------------------------------------------------------


def knocks(seed: int, seconds: float, rate: int) -> np.ndarray:
    """Return (1, samples) float32: two decaying tones of few levels, which FLAC packs well."""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    starts, pitch = rng.uniform(0, seconds - 0.3, 2), rng.uniform(300, 900)
    tones = sum(np.exp(-20 * np.clip(t - s, 0, None)) * np.sin(6.28 * pitch * (t - s)) * (t >= s) for s in starts)
    return (np.round(50 * tones / np.abs(tones).max()) / 128).astype(np.float32)[None]


def square(seed: int) -> Callable[[int], np.ndarray]:
    """Return the pictures of a video in which a light square goes its way."""
    def picture(index: int) -> np.ndarray:
        image = np.full((64, 64, 3), 40 + 10 * seed, dtype=np.uint8)
        x, y = (3 * index + 11 * seed) % 48, (index + 7 * seed) % 48
        image[y : y + 16, x : x + 16] = 220
        return image

    return picture


def video(path: Path, seed: int, seconds: float, fps: int, rate: int = 8_000) -> None:
    path.parent.mkdir(exist_ok=True)
    make_video(path, seconds, fps, pictures=square(seed), sound=knocks(seed, seconds + 0.1, rate), rate=rate,
               audio_codec="flac", options={"crf": "30"}, container_options={"fflags": "+bitexact"})


def make_inputs() -> None:
    for number in range(6):
        video(Path(f"videos/clip_{number}.mkv"), number, 2.0 if number == 5 else 1.2, fps=25)
    Path("videos/clip_4.txt").write_text("a knock on metal\n")
    for number in range(2):
        video(Path(f"long/gong_{number}.mkv"), number, 8.0, fps=8)
    Path("sounds").mkdir()
    for seed, name in enumerate(("rain", "wind")):
        soundfile.write(f"sounds/{name}.flac", knocks(seed, 8.2, 8_000)[0], 8_000)
    Path("sounds/clips.tsv").write_text(
        "id\tname\tstart_sample\tend_sample\nrain_0\train\t0\t64800\nwind_0\twind\t800\t65600\n")
    Path("sounds/captions.tsv").write_text("id\tcaption\nrain\train on a roof\nwind\twind in trees\n")


# -- extracting -------------------------------------------------------------------------------------------------------


def make_features() -> None:
    call(extract_features.main, ["videos", "--output_dir", "features", "--prompt", "a knock on wood", "--workers", "0",
                                 *TINY])
    Path("features/prompts.txt").write_text("clip_2.npz: a knock far away\n")
    for path in Path("features").glob("*.flac"):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))


def make_interrupted() -> None:
    """Kill an extraction when some of its four clips are done; finishing it on a copy gives the features again."""
    folder = Path("interrupted")
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen([sys.executable, extract_features.__file__, *INTERRUPTED],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(folder.glob("*.npz"))) < 2:
            time.sleep(0.001)
        process.kill()
        process.wait()
        if 2 <= len(list(folder.glob("*.npz"))) < 4:
            break
    assert not (folder / "manifest.jsonl").exists()
    shutil.copytree(folder, "kept")
    call(extract_features.main, INTERRUPTED)
    for path in folder.glob("clip_*"):
        assert path.read_bytes() == Path("features", path.name).read_bytes(), path
    shutil.rmtree(folder)
    Path("kept").rename(folder)


def make_interrupted_set() -> dict:
    """Do the first of two parts of a set of sounds; return what its rows are when the second is done too."""
    call(extract_features.main, [*SOUND_SET, "--shard", "1/2"])
    folder = Path("interrupted_set")
    assert not (folder / "set").exists()
    shutil.copytree(folder, "kept")
    call(extract_features.main, [*SOUND_SET, "--shard", "2/2"])
    rows = {path.stem: np.fromfile(path, "<f4").reshape(2, -1) for path in sorted((folder / "set").glob("*.memmap"))}
    shutil.rmtree(folder)
    Path("kept").rename(folder)
    return {name: [numbers_of(torch.from_numpy(row)) for row in values] for name, values in rows.items()}


# -- training ---------------------------------------------------------------------------------------------------------


def make_run() -> None:
    """Train without interruption, and make sure that the first step file leads to the same bits."""
    call(train_lora.main, RUN)
    for folder, more in (("again", []), ("no_dropout", ["--lora_dropout", "0"])):
        call(train_lora.main, ["--config", "run/config.yaml", "--output_dir", folder, "--resume",
                               "run/adapter_step00003.pt", *more])
    whole, again, other = (load_adapter(f"{f}/adapter_final.pt").tensors for f in ("run", "again", "no_dropout"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not all(torch.equal(whole[key], other[key]) for key in whole)
    shutil.copy("no_dropout/adapter_final.pt", "run/without_dropout.pt")
    for folder in ("again", "no_dropout"):
        shutil.rmtree(folder)
    for name in ("adapter_step00006.pt", "adapter_best.pt", "loss_raw.png", "loss_smoothed.png"):
        Path("run", name).unlink(missing_ok=True)


def make_adapters() -> dict:
    """Train an adapter of each kind a little; return what each adds to the weights of the base model."""
    Path("adapters").mkdir()
    for kind, settings in ADAPTERS.items():
        call(train_lora.main, ["--data_dir", "features", "--output_dir", kind, "--steps", "2", "--save_every", "1",
                               "--lr", "0.05", "--warmup_steps", "0", "--batch_size", "1", "--val_fraction", "0",
                               "--duration", "1.2", "--precision", "fp32", "--no_preview", *TINY, *settings])
        shutil.copy(f"{kind}/adapter_final.pt", f"adapters/{kind}.pt")
        if kind in WITH_STEP_FILE:
            keep_step_file(kind)
        shutil.rmtree(kind)
    for kind in AS_SAFETENSORS:
        adapter = load_adapter(f"adapters/{kind}.pt")
        save_adapter(f"adapters/{kind}.safetensors", adapter.tensors, adapter.meta)
    return {path.name: description_of(path) for path in sorted(Path("adapters").iterdir())}


def keep_step_file(kind: str) -> None:
    """Keep the first step file of a run with its settings, and make sure that it leads to the same bits."""
    Path("steps", kind).mkdir(parents=True)
    for name in ("adapter_step00001.pt", "config.yaml"):
        shutil.copy(f"{kind}/{name}", f"steps/{kind}/{name}")
    call(train_lora.main, ["--config", f"steps/{kind}/config.yaml", "--output_dir", "again", "--resume",
                           f"steps/{kind}/adapter_step00001.pt"])
    whole, again = (load_adapter(f"{folder}/adapter_final.pt").tensors for folder in (kind, "again"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    shutil.rmtree("again")


def description_of(path: Path) -> dict:
    """Return the settings of an adapter and the change that it makes to every layer of the base model."""
    adapter, model = load_adapter(path), train_lora.load_generator("tiny_16k")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_adapter(model, adapter)
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    return {"meta": {key: adapter.meta.get(key) for key in ("variant", "rank", "alpha", "target", "lora_config")},
            "changes": {name: numbers_of(change) for name, change in changes.items() if change.any()}}


def numbers_of(tensor: torch.Tensor) -> dict:
    """Return a few numbers that tell a tensor: its length, and single values from all over it."""
    values = tensor.double().flatten()
    return {"norm": values.norm().item(), "values": values[:: max(1, len(values) // 11)].tolist()}


def validation_loss_of_memmap() -> float:
    call(train_lora.main, ["--data_dir", "memmap/set", "--val_dir", "memmap/set", "--output_dir", "on_memmap",
                           "--steps", "1", "--batch_size", "1", "--precision", "fp32", "--no_preview", *TINY])
    rows = [json.loads(line) for line in Path("on_memmap/metrics.jsonl").read_text().splitlines()]
    shutil.rmtree("on_memmap")
    return next(row["val_loss"] for row in rows if row["step"] == 0)


def dropout_mask() -> str:
    """Return which of 64 values dropout takes; PyTorch draws otherwise on processors of Intel than on others."""
    torch.manual_seed(0)
    return "".join(map(str, torch.nn.functional.dropout(torch.ones(64), 0.5).bool().int().tolist()))


# -- all of it --------------------------------------------------------------------------------------------------------


def clean() -> None:
    """Remove locks, empty folders, which git does not keep, and names of this machine."""
    for path in [*Path(".").rglob("*.lock"), *Path(".").rglob("lock")]:
        path.unlink()
    for path in Path(".").rglob(".partial-*"):
        if not any(path.iterdir()):
            path.rmdir()
    for path in Path(".").rglob("journal-*.jsonl"):
        first, _, rest = path.read_text().partition("\n")
        path.write_text(json.dumps({**json.loads(first), "host": "somewhere", "pid": 1}) + "\n" + rest)
    for path in Path(".").rglob("*"):
        absolute = [str(Path.cwd()), str(Path(selva.__file__).parents[1]), str(Path.home()), sys.prefix]
        found = [name for name in absolute if path.is_file() and name.encode() in path.read_bytes()]
        assert not found, (path, found)


def main(out: str) -> None:
    print(f"selva {selva.__version__} of {Path(selva.__file__).parent}", file=sys.stderr)
    Path(out).mkdir(parents=True)
    os.chdir(out)
    make_inputs()
    make_features()
    make_interrupted()
    call(extract_features.main, MEMMAP)
    expected = {"version": selva.__version__, "dropout_mask": dropout_mask(), "interrupted_set": make_interrupted_set()}
    make_run()
    expected |= {"adapters": make_adapters(), "memmap_val_loss": validation_loss_of_memmap()}
    call(infer.main, GENERATED)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    clean()


if __name__ == "__main__":
    main(sys.argv[1])
