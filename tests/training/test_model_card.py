"""The model card: a header that YAML reads, a command that works, and a README of the user that stays."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from selva.training.model_card import card_text, use_command, write_card
from selva.training.set_aside import move_old_run_aside

META = {"variant": "small_16k", "rank": 8, "target": ["attn.qkv"], "step": 500, "num_clips": 12, "clip_features": "use"}


def test_the_header_is_yaml_and_the_text_says_how_to_use_it():
    text = card_text(Path("runs/dog/adapter_final.pt"), META, ['a "big" dog: barks', "x|y"], None)
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "jnwnlee/SelVA" and "lora" in header["tags"]
    assert '# a "big" dog: barks' in text and "| rank | 8 |" in text and "x\\|y" in text
    assert "--adapter" in text and "No verdict" in text
    tiny = yaml.safe_load(card_text(Path("a.pt"), {"variant": "tiny_16k"}, [], None).split("---")[1])
    assert "base_model" not in tiny


def test_the_command_survives_a_shell():
    words = shlex.split(use_command("my run/a.pt", "tiny_16k", 'a "$x" `y`'))
    assert words[words.index("--prompt") + 1] == 'a "$x" `y`' and words[words.index("--adapter") + 1] == "my run/a.pt"


def test_a_readme_of_the_user_is_neither_overwritten_nor_moved(tmp_path, caplog):
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, card_text(tmp_path / "adapter_final.pt", META, ["a dog"], None))
    assert (tmp_path / "README.md").read_text() == "mine" and "a dog" in (tmp_path / "model_card.md").read_text()
    assert "stays as it is" in caplog.text
    move_old_run_aside(tmp_path)
    assert (tmp_path / "README.md").exists() and not (tmp_path / "model_card.md").exists()
    (tmp_path / "README.md").unlink()
    for name in ("a cat", "a bird"):
        write_card(tmp_path, card_text(tmp_path / "adapter_final.pt", META, [name], None))
    assert "a bird" in (tmp_path / "README.md").read_text() and not (tmp_path / "model_card.md").exists()
    move_old_run_aside(tmp_path)
    assert not (tmp_path / "README.md").exists()
