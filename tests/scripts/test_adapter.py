"""scripts/adapter.py: every subcommand once, and mistakes in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_adapter import make_adapter

from scripts import adapter as script
from selva import cli
from selva.checkpoint import load_adapter, save_adapter
from selva.lora.merge import merge_adapters
from selva.weights.adapters import generator_tensors
from selva.weights.load import load_generator


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    paths = tmp_path / "a.pt", tmp_path / "b.pt"
    for seed, path in enumerate(paths):
        made = make_adapter(seed)
        save_adapter(path, made.tensors, made.meta)
    return paths


def run(*arguments) -> int:
    return script.main([str(a) for a in arguments])


def test_look_at_them(files, capsys):
    assert run("info", *files, "--layers") == 0
    text = capsys.readouterr().out
    assert "base model: tiny_16k" in text and "ComfyUI-SelVA: yes, as .pt" in text
    assert "attn.qkv\trank 2\tused 2" in text
    assert run("diff", files[0], files[0]) == 0
    assert "difference 0," in (line := capsys.readouterr().out) and "cosine 1.0000" in line
    assert run("diff", *files) == 0
    assert "cosine 1.0000" not in capsys.readouterr().out
    assert run("check", *files, "--variant", "tiny_16k") == 0
    assert run("check", files[0], "--variant", "small_16k") == cli.EXIT_FAILED


def test_convert_to_every_format_and_back(files, tmp_path, capsys):
    steps = [("peft", "p"), ("kohya", "k.safetensors"), ("comfyui", "c.pt"), ("selva", "s.safetensors")]
    source = files[0]
    for to, name in steps:
        assert run("convert", source, "--to", to, "--output", tmp_path / name) == 0
        source = tmp_path / name
        capsys.readouterr()
        assert run("info", source, "--variant", "tiny_16k") == 0  # says what has to be converted first
        text, ours = capsys.readouterr().out, to in ("comfyui", "selva")
        assert ("(infer.py): yes\n" in text) == ours and ("yes, after convert --to selva" in text) == (not ours)
        assert ("ComfyUI-SelVA: yes, as .pt\n" in text) == ours and ("convert --to comfyui" in text) == (not ours)
    before, after = load_adapter(files[0]), load_adapter(source)
    assert all(torch.equal(after.tensors[key], value) for key, value in before.tensors.items())
    assert after.meta["variant"] == "tiny_16k"


def test_merge_resize_soup_bake_and_extract(files, tmp_path, capsys):
    a, b = files
    assert run("merge", f"{a}:0.8", f"{b}:0.5", "--output", tmp_path / "both.pt") == 0
    assert load_adapter(tmp_path / "both.pt").meta["rank"] == 4
    assert run("merge", a, b, "--rank", "1", "--output", tmp_path / "small.pt") == 0
    assert "energy kept 0." in capsys.readouterr().out
    assert run("resize", a, "--energy", "0.5", "--output", tmp_path / "cut.pt") == 0
    assert load_adapter(tmp_path / "cut.pt").meta["rank"] == 1
    assert run("soup", a, b, "--output", tmp_path / "soup.pt") == 0
    assert run("bake", f"{a}:0.8", f"{b}:0.5", "--output", tmp_path / "baked") == 0
    tuned = tmp_path / "baked" / "tiny_16k_generator.safetensors"
    assert run("extract", "--tuned", tuned, "--variant", "tiny_16k", "--rank", "4", "--output", tmp_path / "x.pt") == 0
    merged = load_generator("tiny_16k")
    merge_adapters(merged, [(load_adapter(tmp_path / "x.pt"), 1.0)])
    baked = generator_tensors(tuned, "tiny_16k")
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, baked[key], rtol=0, atol=1e-5)


def test_an_extracted_adapter_keeps_what_its_generators_say(files, tmp_path):
    """Which CLIP features were baked in, and a base model of the user's own."""
    made, name = make_adapter(2), "tiny_16k_generator.safetensors"
    save_adapter(tmp_path / "empty.pt", made.tensors, {**made.meta, "clip_features": "empty"})
    assert run("bake", tmp_path / "empty.pt", "--output", tmp_path / "baked") == 0
    assert run("bake", files[0], "--output", tmp_path / "my.pth") == 0
    extract = ["extract", "--variant", "tiny_16k", "--rank", "4", "--overwrite", "--output", tmp_path / "x.pt"]
    for more, clip_features, base in (
        (["--tuned", tmp_path / "baked"], "empty", None),
        (["--tuned", tmp_path / "baked" / name, "--base", tmp_path / "my.pth"], "empty", "my.pth"),
        (["--tuned", tmp_path / "my.pth", "--base", tmp_path / "baked"], None, None),
    ):
        assert run(*extract, *more) == 0
        meta = load_adapter(tmp_path / "x.pt").meta
        assert meta.get("clip_features") == clip_features
        assert meta.get("generator", {}).get("name") == base


@pytest.mark.parametrize("command", ["merge", "soup"])
def test_files_of_the_same_name_are_compared(tmp_path, caplog, command):
    made = make_adapter()
    for folder, clip in (("dog", "use"), ("cat", "empty"), ("door", "use")):
        (tmp_path / folder).mkdir()
        save_adapter(tmp_path / folder / "adapter_final.pt", made.tensors, {**made.meta, "clip_features": clip})
    dog, cat, door = (tmp_path / folder / "adapter_final.pt" for folder in ("dog", "cat", "door"))
    assert run(command, dog, cat, "--output", tmp_path / "x.pt") == cli.EXIT_FAILED
    assert f"clip_features: {dog}: use, {cat}: empty" in caplog.text and not (tmp_path / "x.pt").exists()
    assert run(command, dog, door, "--output", tmp_path / "x.pt") == 0
    merged_from = load_adapter(tmp_path / "x.pt").meta["merged_from"]
    assert [name for name, _ in merged_from] == ["dog/adapter_final.pt", "door/adapter_final.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "A", "B"], 2, "give --output|"),
        (["merge", "A:0.8", "B:0.5"], 2, "give --output|"),
        (["merge", "A", "B", "new file.pt"], 2, "give --output 'new file.pt'|"),
        (["convert", "A", "out.safetensors"], 2, "convert writes a file: give --output out.safetensors|"),
        (["resize", "A", "B", "--rank", "1"], 2, "resize writes a file: give --output "),
        (["merge", "--output", "x.pt"], 2, "merge takes at least 1 adapter, got 0"),
        (["diff", "A"], 2, "diff takes 2 adapters, got 1"),
        (["resize", "A", "--output", "x.pt"], 2, "takes --rank or --energy"),
        (["convert", "A", "--output", "B"], 2, "is there already"),
        (["check", "A"], 2, "check takes the --variant"),
        (["info", "no.pt"], 1, "no.pt: no such file"),
        (["extract", "--variant", "tiny_16k"], 2, "extract takes --tuned"),
        (["extract", "--tuned", "none.pth", "--variant", "tiny_16k", "--rank", "4", "--output", "x.bin"], 2,
         "x.bin: the format selva is written as .pt or"),
        (["merge", "no.pt", "--output", "x.bin"], 2, "x.bin: the format selva is written as"),
        (["convert", "no.pt", "--to", "peft", "--output", "x.pt"], 2, "x.pt: an adapter of PEFT is a folder"),
        (["bake", "A", "--output", "x.pt"], 2, "x.pt: a generator is written as .pth or .safetensors, or into a"),
        (["merge", "A:1e39", "--output", "x.pt"], 1, "x.pt: not written: there are NaN or infinite values in joint_"),
        (["extract", "--tuned", "none.pth", "--variant", "tiny_16k", "--rank", "4"], 2, "extract writes a file"),
        (["merge", "A:x", "--output", "x.pt"], 1, "the strength is 'x'"),
    ],
)
def test_mistakes_are_one_line(files, arguments, code, message, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"A": str(files[0]), "B": str(files[1]), "A:x": f"{files[0]}:x", "A:0.8": f"{files[0]}:0.8",
             "B:0.5": f"{files[1]}:0.5", "A:1e39": f"{files[0]}:1e39"}
    assert run(*(named.get(a, a) for a in arguments)) == code
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert message in record.getMessage() + "|" and "\n" not in record.getMessage()
    assert not (tmp_path / "x.pt").exists()


def with_meta(path: Path, **meta) -> Path:
    """An adapter as other programs and hands may write it."""
    made = make_adapter()
    torch.save({"state_dict": dict(made.tensors), "meta": {**made.meta, "alpha": 2.0, **meta}}, path)
    return path


@pytest.mark.parametrize("command", ["info", "check"])
def test_an_adapter_that_cannot_be_read_does_not_hide_the_others(files, tmp_path, command, caplog, capsys):
    (tmp_path / "bad.pt").write_bytes(b"PK, but no zip")
    odd = with_meta(tmp_path / "odd.pt", variant=["tiny_16k"])
    more = [] if command == "info" else ["--variant", "tiny_16k"]
    assert run(command, tmp_path / "bad.pt", files[0], odd, tmp_path / "no.pt", files[1], *more) == cli.EXIT_FAILED
    printed = capsys.readouterr().out
    assert f"{files[0]}: " in printed and f"{files[1]}: " in printed
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.partition(":")[0] for error in errors] == [str(tmp_path / n) for n in ("bad.pt", "odd.pt", "no.pt")]
    assert "variant in the meta is ['tiny_16k'], expected the name of a base model" in errors[1]


def test_a_variant_that_is_not_known_here_is_shown(tmp_path, capsys):
    for variant, said in (("huge_96k", "huge_96k"), (None, "not said")):
        assert run("info", with_meta(tmp_path / "a.pt", variant=variant)) == 0
        assert f"base model: {said}\n" in capsys.readouterr().out
    assert run("bake", tmp_path / "a.pt", "--variant", "tiny_16k", "--output", tmp_path / "baked") == 0
