"""benchmarks/guidance.py: guided sampling with the unconditional branch of either model, and the tables of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import guidance
import pytest
import torch
from guidance import STRENGTHS, guided_latents, tables

from selva.flow import SamplingConfig
from selva.lora.config import LoRAConfig
from selva.lora.inject import inject_lora
from selva.lora.state import lora_parameters
from selva.sampling import sample_latents
from selva.weights.load import load_generator
from toyworld.measure import EncodedCases

SECONDS = 1.0


@pytest.fixture(scope="module")
def models():
    """The base model, and one with an adapter that has moved it."""
    base, adapted = (load_generator("tiny_16k", None).eval() for _ in range(2))
    inject_lora(adapted, LoRAConfig(rank=2), torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(adapted):
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return base, adapted


@pytest.fixture
def scenes(models, monkeypatch) -> list[EncodedCases]:
    monkeypatch.setattr(guidance, "SamplingConfig", lambda: SamplingConfig(3))
    config, rng = models[0].config, torch.Generator().manual_seed(3)
    lengths = guidance.sequence_config("16k", SECONDS)
    return [EncodedCases(*(torch.randn(1, count, width, generator=rng) for count, width in (
        (lengths.clip_seq_len, config.clip_dim), (lengths.sync_seq_len, config.sync_dim),
        (config.text_seq_len, config.text_dim)))) for _ in range(2)]


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_with_its_own_branch_it_is_the_sampling_of_every_user(models, scenes, strength):
    _, adapted = models
    found = guided_latents(adapted, adapted, scenes, strength, 5, SECONDS, clip_features=True)
    features = [torch.cat([getattr(one, name) for one in scenes]) for name in ("clip_f", "sync_f", "text_f")]
    expected = sample_latents(adapted, *features, [5, 6], SamplingConfig(3, cfg_strength=strength))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_branch_counts_only_where_there_is_guidance(models, scenes):
    base, adapted = models

    def made(branch, strength):
        return guided_latents(adapted, branch, scenes, strength, 0, SECONDS, clip_features=False)

    assert torch.equal(made(base, 1.0), made(adapted, 1.0))
    assert (made(base, 3.0) - made(adapted, 3.0)).abs().max() > 0.01


def test_every_run_has_a_line_in_every_table():
    parts = {"new": {"recognised": 0.25, "distance_db": 7.26, "hits": "1000"},
             "known": {"recognised": 0.75, "distance_db": 3.0, "hits": "1110"}}
    row = {"key": "k", "method": "short", "sound": "gong", "seed": 1, "new_scenes": 4, "known_scenes": 4,
           **{name: {f"{strength:g}": parts for strength in strengths} for name, strengths in STRENGTHS.items()}}
    text = "\n".join(tables([row]))
    assert "| method | sound | seed | 1 | 1.5 | 2 | 3 | 4.5 | 1.5, base | 2, base | 3, base | 4.5, base |" in text
    assert "Scenes (4 new, 4 known)" in text
    assert [text.count(f"| short | gong | 1 | {value} |") for value in ("25", "75", "7.3")] == [1, 1, 1]


def test_new_and_known_scenes_are_measured_at_every_strength_with_either_branch(tmp_path, monkeypatch):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "k.pt").touch()
    asked, scenes = [], {"gong": 6, "known": 3}

    def made(generator, branch, scenes, strength, first, *others):
        asked.append((branch is generator, strength, first, len(scenes)))
        return scenes

    class Maker:
        device = torch.device("cpu")

        def decode(self, latents, seconds):
            return latents

    def heard(sounds, cases, classifier):
        assert len(sounds) == len(cases)
        return {"recognised": len(cases), "distance_db": 0.0, "hits": "", "margin": 1.0}

    inputs = SimpleNamespace(scenes=lambda which, name: ([which] * scenes[name], [name] * scenes[name]))
    monkeypatch.setattr(guidance, "load_adapter", lambda path: SimpleNamespace(meta={}))
    monkeypatch.setattr(guidance, "merge_adapter", lambda generator, adapter, strength: None)
    monkeypatch.setattr(guidance, "guided_latents", made)
    monkeypatch.setattr(guidance, "heard_figures", heard)
    monkeypatch.setattr(guidance, "Inputs", lambda work, maker, seconds: inputs)
    args = SimpleNamespace(work=tmp_path, duration=SECONDS, count=5, known=20)
    row = guidance.measure({"key": "k", "method": "m", "sound": "gong", "seed": 1, "scenes": "select"}, args, Maker(),
                           None)
    assert (row["new_scenes"], row["known_scenes"]) == (5, 3)
    for branch, strengths in STRENGTHS.items():
        assert list(row[branch]) == [f"{strength:g}" for strength in strengths]
        for strength, parts in row[branch].items():
            assert {name: part["recognised"] for name, part in parts.items()} == {"new": 5, "known": 3}
            found = [one[2:] for one in asked if one[:2] == (branch == "adapted", float(strength))]
            assert found == [(0, 4), (4, 1), (0, 3)]  # in batches, each scene with its own seed


def test_mistakes_are_one_line(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"key": "there", "scenes": "select", "sound": "gong"}) + "\n")
    assert guidance.main(["--keys", "lost", "--rows", str(rows), "--results", str(tmp_path / "g.json")]) == 1
    assert "has no run lost" in capsys.readouterr().err
    rows.write_text(json.dumps({"key": "first-gong", "scenes": "first", "sound": "gong"}) + "\n")
    assert guidance.main(["--keys", "first-gong", "--rows", str(rows), "--results", str(tmp_path / "g.json")]) == 1
    assert "first-gong: made for an earlier version" in capsys.readouterr().err
