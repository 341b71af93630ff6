"""Prompts that are longer than the text encoder reads: the part that is read, and the warning."""

from __future__ import annotations

import logging

import pytest

import extract_features
import infer
import train_lora
from selva.models.clip_t5 import ClipText
from selva.models.config import ClipConfig
from selva.models.prompt_length import part_that_is_read, warn_of_cut_prompts
from selva.models.variants import get_variant
from tests.make_data import put_clip
from tests.make_media import make_video

TINY = get_variant("tiny_16k").clip
LONG = "A dog barks  twice, then a door closes far away and " + "rain falls " * 10


@pytest.mark.parametrize("prompt", ["", "a dog", "x" * 75, " ".join(["x"] * 38), "é" * 37])
def test_what_fits_is_read(prompt):
    assert part_that_is_read(prompt, TINY) is None


def test_the_part_that_is_read_gives_the_same_tokens():
    part = part_that_is_read(LONG, TINY)
    assert part == "a dog barks twice, then a door closes far away and rain falls rain falls ra"
    tokenize = ClipText(TINY).tokenize
    assert (tokenize([part]) == tokenize([LONG])).all()
    assert part_that_is_read("é" * 38, TINY) == "é" * 37


def test_word_pieces_of_the_published_encoder():
    pytest.importorskip("open_clip")
    from open_clip.tokenizer import SimpleTokenizer

    assert part_that_is_read("dog " * 75, ClipConfig()) is None
    prompt = "Dogs barking, " * 40
    part = part_that_is_read(prompt, ClipConfig())
    assert part is not None and prompt.lower().replace(' ', '').startswith(part.replace(' ', ''))
    tokens = SimpleTokenizer(context_length=77)
    assert (tokens([part]) == tokens([prompt])).all()


def test_one_line_per_prompt_with_all_its_clips(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_cut_prompts([("a", LONG), ("b", "short"), ("c", LONG)], TINY)
    assert caplog.text.count("WARNING") == 1 and "a, c: the prompt is longer than the 77 tokens" in caplog.text
    assert "what follows 'es far away and rain falls rain falls ra' is not read" in caplog.text


def test_many_are_named_in_a_few_lines(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_cut_prompts([(f"clip_{i}", f"{i} {LONG}") for i in range(30)], TINY)
    assert caplog.text.count("WARNING") == 21 and "10 more prompts are too long" in caplog.text


def test_it_is_said_in_extraction_training_and_inference(tmp_path, capsys):
    make_video(tmp_path / "dog one.mp4", 1.0)
    said = "what follows 'es far away and rain falls rain falls ra' is not read"
    common = ["--variant", "tiny_16k", "--device", "cpu"]
    assert extract_features.main([str(tmp_path / "dog one.mp4"), "--output_dir", str(tmp_path / "f"), "--prompt", LONG,
                                  "--audio", "none", *common]) == 0
    assert f"dog one: the prompt is longer than the 77 tokens that the text encoder reads; {said}" in (
        capsys.readouterr().err)
    assert infer.main(["--features", str(tmp_path / "f" / "dog one.npz"), "--negative_prompt", LONG[1:], "--output",
                       str(tmp_path / "dog.flac"), "--num_steps", "1", *common]) == 0
    error = capsys.readouterr().err
    assert "dog one.npz: the prompt is longer" in error and "dog one.npz, negative prompt: the prompt is lo" in error
    put_clip(tmp_path / "data", "clip_7", prompt=LONG)
    for _ in range(2):  # the second run finds the text in the cache
        train_lora.main(["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--steps", "1",
                         "--rank", "2", *common])
        assert "clip_7: the prompt is longer" in capsys.readouterr().err
