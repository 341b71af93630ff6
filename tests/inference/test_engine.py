"""selva.inference.engine: one sound and many, exchanged adapters, memory, and the five lines of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from make_media import make_video
from tiny_adapter import make_adapter

from selva.checkpoint import save_adapter
from selva.extraction.extractor import FeatureExtractor
from selva.features import FeatureBundle, load_features, save_features
from selva.flow import SamplingConfig
from selva.inference.engine import SoundGenerator, uses_clip_features
from selva.inference.request import SoundRequest
from selva.lora.merge import Adapter
from selva.models.variants import get_variant
from selva.sequence import sequence_config

ROOT = Path(__file__).parents[2]
QUICK = {"device": "cpu", "precision": "fp32", "sampling": SamplingConfig(num_steps=3)}


def tiny(**more) -> SoundGenerator:
    return SoundGenerator("tiny_16k", **{**QUICK, **more})


def put_features(path: Path, seconds: float = 1.0, seed: int = 0) -> Path:
    """Write features of something that runs all the time, so that there is a sound, each a little different."""
    lengths, random = sequence_config("16k", seconds), torch.Generator().manual_seed(seed)
    clip = torch.randn(1, lengths.clip_seq_len, 64, generator=random)
    sync = torch.randn(1, lengths.sync_seq_len, 64, generator=random)
    sync = 0.3 * sync
    sync[..., 42:63] += 2.4  # the level of running sources, see toyworld.training.encoders
    path.parent.mkdir(parents=True, exist_ok=True)
    save_features(path, FeatureBundle(clip / 8, sync, seconds, "rain", "tiny_16k"))
    return path


def difference_db(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the level of a - b relative to that of b."""
    return 20 * torch.log10((a - b).norm() / b.norm() + 1e-12).item()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("features")
    return [put_features(folder / f"clip_{index}.npz", 1.0 if index < 4 else 1.5, index) for index in range(5)]


# -- one sound and many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, latents_db, sound_db", [("fp32", -100.0, -35.0), ("bf16", -40.0, -3.0)])
def test_batch_1_and_batch_4_make_the_same_sounds(bundles, precision, latents_db, sound_db):
    """Sums of a larger matrix product are rounded differently, and finding phases for a mel multiplies that."""
    generator = tiny(batch_size=4, precision=precision, clip_features="use")
    conditions = generator.encode([SoundRequest(features=path) for path in bundles])
    latents = generator.sample(conditions, [1, 2, 3, 4, 5])
    sounds = generator.decode(conditions, latents)
    (alone,) = generator.sample(conditions[:1], [1])
    assert difference_db(latents[0], alone) < latents_db
    for seed, (path, together) in enumerate(zip(bundles, sounds, strict=True), 1):
        alone = generator.generate(features=path, seed=seed)
        assert difference_db(together.waveform, alone.waveform) < sound_db
    assert [len(sound.waveform) for sound in sounds] == [16_000] * 4 + [24_000]
    (other,) = generator.sample(conditions[1:2], [1])
    assert difference_db(other, latents[1]) > -20


def test_batches_hold_clips_of_one_length_only(bundles):
    generator = tiny(batch_size=3)
    conditions = generator.encode([SoundRequest(features=path) for path in (bundles[4], *bundles)])
    assert generator.batches(conditions) == [[0, 5], [1, 2, 3], [4]]


def test_steps_are_counted_over_all_batches(bundles):
    generator, steps = tiny(batch_size=2), []
    conditions = generator.encode([SoundRequest(features=path) for path in bundles[:3]])
    generator.sample(conditions, [1, 1, 1], steps.append)
    assert steps == [1, 2, 3, 4, 5, 6] and len(generator.batches(conditions)) * 3 == 6


def test_a_request_that_cannot_be_used_does_not_stop_the_others(bundles, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    failed = {}
    requests = [SoundRequest(features=tmp_path / "bad.npz"), SoundRequest(features=bundles[0])]
    conditions = tiny().encode(requests, on_error=failed.__setitem__)
    assert conditions[0] is None and conditions[1] is not None and list(failed) == [0]
    with pytest.raises(ValueError, match=r"bad\.npz"):
        tiny().encode(requests)


def test_features_may_be_given_as_a_bundle(bundles):
    from_file = tiny().generate(features=bundles[0], seed=3)
    assert torch.equal(tiny().generate(features=load_features(bundles[0]), seed=3).waveform, from_file.waveform)


def test_a_mixed_batch_gives_each_its_own_conditions(bundles):
    """A clip without pictures or negative prompt, sampled beside one that has them, sounds as it does alone."""
    generator = tiny(clip_features="use")
    watched = SoundRequest(features=bundles[0], negative_prompt="music")
    requests = [watched, SoundRequest(prompt="x", duration_sec=1.0)]
    conditions = generator.encode(requests)
    together = generator.decode(conditions, generator.sample(conditions, [7, 7]))
    for request, sound in zip(requests, together, strict=True):
        (alone,) = conditions = generator.encode([request])
        (expected,) = generator.decode([alone], generator.sample(conditions, [7]))
        assert difference_db(sound.waveform, expected.waveform) < -35


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give a video, features or a prompt"),
        ({"video": Path("a.mp4"), "features": Path("a.npz")}, "not both"),
        ({"prompt": "x", "start_sec": 1.0}, "belong to a video"),
    ],
)
def test_requests_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoundRequest(**arguments)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="offload is 'yes', expected one of auto, none"):
        tiny(offload="yes")


def test_a_sound_without_pictures_cannot_become_a_video(bundles, tmp_path):
    with pytest.raises(ValueError, match="there are no pictures"):
        tiny().generate(features=bundles[0]).save(tmp_path / "a.mp4")


# -- lengths and levels ------------------------------------------------------------------------------------------------


def test_long_sounds_are_made_in_windows_and_short_ones_as_ever():
    short = {"prompt": "rain", "duration_sec": 2.0}
    assert torch.equal(tiny(long=True).generate(**short).waveform, tiny().generate(**short).waveform)
    long = tiny(long=True).generate(prompt="rain", duration_sec=9.5)
    assert long.duration_sec == 9.5 and not torch.equal(
        long.waveform, tiny().generate(prompt="rain", duration_sec=9.5).waveform
    )


def test_long_means_all_of_a_video(tmp_path):
    video = make_video(tmp_path / "a.mp4", 8.4)
    request = [SoundRequest(video=video, prompt="x")]
    assert tiny(long=True).encode(request)[0].sequence.duration_sec == pytest.approx(8.4)
    assert tiny().encode(request)[0].sequence.duration_sec == 8.0


def test_what_is_shorter_than_was_asked_for_is_named(bundles, tmp_path, caplog):
    video = make_video(tmp_path / "a.mp4", 1.6)
    for source, name in (({"features": str(bundles[0])}, bundles[0]), ({"video": video, "prompt": "x"}, video)):
        tiny().generate(**source)
        tiny().generate(**source, duration_sec=1.0)
        assert "the length that was asked for" not in caplog.text
        seconds = tiny().generate(**source, duration_sec=8.0).duration_sec
        assert f"and the sound with them: {name} ({seconds:g} instead of 8 s)" in caplog.text
        caplog.clear()


def test_the_level_is_brought_to_the_target(bundles):
    plain = tiny().generate(features=bundles[0])
    loud = tiny(normalize="rms", target=-30.0).generate(features=bundles[0])
    level = 20 * loud.waveform.square().mean().sqrt().log10().item()
    assert level == pytest.approx(-30, abs=0.01) and "-30.0 dBFS RMS" in str(loud.level)
    gain = 10 ** (loud.level.gain_db / 20)
    torch.testing.assert_close(loud.waveform, plain.waveform * gain)
    assert "not normalised" in str(plain.level)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_strength_zero_is_no_adapter_bit_for_bit(bundles, precision):
    adapter = make_adapter()
    base = tiny(precision=precision).generate(features=bundles[0])
    zero = tiny(precision=precision, adapters=[(adapter, 0.0)]).generate(features=bundles[0])
    one = tiny(precision=precision, adapters=[adapter]).generate(features=bundles[0])
    assert torch.equal(base.waveform, zero.waveform) and not torch.equal(base.waveform, one.waveform)


def test_adapters_say_which_clip_features_they_want():
    """Pitfall B2: official SelVA passes the empty CLIP sequence, so no adapter means empty."""
    variant, use = get_variant("tiny_16k"), make_adapter()
    empty = Adapter(use.tensors, {**use.meta, "clip_features": "empty"})
    assert uses_clip_features("auto", variant, []) is False
    assert uses_clip_features("auto", get_variant("mmaudio_small_16k"), []) is True
    assert uses_clip_features("auto", variant, [(use, 1.0)]) is True
    assert uses_clip_features("auto", variant, [(empty, 1.0)]) is False
    assert uses_clip_features("auto", variant, [(empty, 1.0), (use, 0.0)]) is False
    assert uses_clip_features("use", variant, [(empty, 1.0)]) is True
    with pytest.raises(ValueError, match="different --clip_features"):
        uses_clip_features("auto", variant, [(empty, 1.0), (use, 1.0)])


def test_clip_features_that_were_not_encoded_are_missed(tmp_path):
    generator = tiny()
    conditions = generator.encode([SoundRequest(video=make_video(tmp_path / "a.mp4", 1.0), prompt="x")])
    generator.set_adapters([make_adapter()])
    with pytest.raises(ValueError, match="encode it again"):
        generator.sample(conditions, [1])


# -- memory ------------------------------------------------------------------------------------------------------------


def loaded(generator: SoundGenerator) -> set[str]:
    extractor = generator.extractor
    parts = {
        "texts": extractor._texts._encoder, "t5": extractor._t5._encoder,
        "clip": extractor._clip_image, "video": extractor._video_encoder,
        "generator": generator._switch.generator, "decoders": generator._decoders,
    }
    return {name for name, network in parts.items() if network is not None}


@pytest.mark.parametrize("offload", ["auto", "none"])
def test_networks_are_freed_or_kept(tmp_path, offload):
    generator = tiny(offload=offload, clip_features="use")
    keep = offload == "none"
    conditions = generator.encode([SoundRequest(video=make_video(tmp_path / "a.mp4", 1.0), prompt="x")])
    encoders = {"texts", "t5", "clip", "video"}
    assert loaded(generator) == (encoders if keep else {"video"})
    latents = generator.sample(conditions, [1])
    assert loaded(generator) == (encoders | {"generator"} if keep else {"generator"})
    (sound,) = generator.decode(conditions, latents)
    assert loaded(generator) == (encoders | {"generator", "decoders"} if keep else {"decoders"})
    assert generator._decoders[0].encoder is None  # the VAE's, which sound is never made with
    generator.free()
    assert not loaded(generator)
    (again,) = generator.decode(conditions, generator.sample(conditions, [1]))
    assert torch.equal(again.waveform, sound.waveform)


@pytest.mark.parametrize("encoder", ["clip_features", "sync_features"])
def test_what_a_clip_that_failed_had_in_memory_is_freed_before_the_next_one(tmp_path, monkeypatch, caplog, encoder):
    """Kept, it would leave the clips behind one that did not fit into a graphics card no memory either."""
    caplog.set_level("INFO", "selva")  # pytest would keep the traceback, which is logged for --debug
    original, left, failed = getattr(FeatureExtractor, encoder), [], {}

    def encoded(self, frames, *words):
        assert all(activations() is None for activations in left)
        activations = torch.ones(1)
        left.append(weakref.ref(activations))
        if len(left) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return original(self, frames, *words)

    monkeypatch.setattr(FeatureExtractor, encoder, encoded)
    requests = [SoundRequest(video=make_video(tmp_path / f"{name}.mp4", 1.0), prompt="x") for name in "abc"]
    generator = tiny(clip_features="use")
    conditions = generator.encode(requests, on_error=lambda index, error: failed.update({index: str(error)}))
    assert [one is None for one in conditions] == [True, False, False] and len(left) == 3
    assert list(failed) == [0] and "out of memory" in failed[0]
    left.clear()
    with caplog.at_level("DEBUG", "selva"):
        generator.encode(requests[:1], on_error=lambda *_: None)
    assert "in encoded\n" in caplog.text  # with --debug, the whole traceback


# -- from Python -------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, selva; print('torch' in sys.modules, 'SoundGenerator' in dir(selva), selva.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[:2] == ["False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import selva

        selva.nothing  # noqa: B018


@pytest.mark.parametrize("document", ["README.md", "docs/inference.md"])
def test_the_lines_of_the_documents_work(document, tmp_path, monkeypatch):
    text = (ROOT / document).read_text(encoding="utf-8").split("## From Python")[1]
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code = code.replace('"small_16k", "weights"', '"tiny_16k"')
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"([\w/]+\.mp4)"', code)[:1]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        make_video(Path(name), 1.0)
    for name in set(re.findall(r'"([\w/]+\.pt)"', code)):
        save_adapter(Path(name), make_adapter().tensors, {"variant": "tiny_16k", "target": ["attn.qkv"]})
    for name in set(re.findall(r'"([\w/]+)\.npz"', code)):
        put_features(Path(f"{name}.npz"))
    exec(compile(code, document, "exec"), {})
    written = re.findall(r'save\("([^"]+)"\)', code)
    assert written and all(Path(name).stat().st_size > 0 for name in written)


# -- where and when adapters act ---------------------------------------------------------------------------------------


def latents_of(path: Path, times=(0.0, 1.0), layers=(), adapters=None, **more) -> torch.Tensor:
    generator = tiny(adapters=[make_adapter()] if adapters is None else adapters, adapter_times=times,
                     adapter_layers=layers, clip_features="use", **more)
    return generator.sample(generator.encode([SoundRequest(features=path)]), [7])[0]


def test_adapters_act_at_their_times_only(bundles):
    """Three Euler steps begin at 0, 1/3 and 2/3: to the last bit the whole, nothing, and neither of them."""
    whole, base = latents_of(bundles[0]), latents_of(bundles[0], adapters=[])
    assert torch.equal(latents_of(bundles[0], (0.0, 0.7)), whole)
    assert torch.equal(latents_of(bundles[0], (0.7, 1.0)), base)
    early, late = latents_of(bundles[0], (0.0, 0.4)), latents_of(bundles[0], (0.4, 1.0))
    assert len({tuple(x.flatten().tolist()) for x in (whole, base, early, late)}) == 4


def test_an_interval_changes_over_to_the_base_model_on_the_way(bundles):
    """The first step of the one model, the others of the other, made by hand."""
    from selva.sampling import draw_noise, guided_velocity

    found, velocities = latents_of(bundles[0], (0.0, 0.2)), []
    for adapters in ([make_adapter()], []):
        generator = tiny(adapters=adapters, clip_features="use")
        (item,) = generator.encode([SoundRequest(features=bundles[0])])
        model = generator._switch.set(generator.adapters)
        model.set_sequence(item.sequence.latent_seq_len, item.sequence.clip_seq_len, item.sequence.sync_seq_len)
        with torch.no_grad():
            conditions = model.preprocess_conditions(item.clip_f, item.sync_f, item.text_f)
            velocities.append(guided_velocity(model, conditions, model.empty_conditions(1), 4.5))
    x = draw_noise(model, [7])
    with torch.no_grad():
        for step, fn in enumerate([velocities[0], velocities[1], velocities[1]]):
            grid = torch.linspace(0, 1, 4)
            x = x + (grid[step + 1] - grid[step]) * fn(grid[step], x)
        torch.testing.assert_close(found, model.unnormalize(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["midpoint", "heun", "ab2"])
def test_other_solvers_know_the_times(bundles, solver):
    sampling = SamplingConfig(num_steps=2, solver=solver)
    assert torch.equal(latents_of(bundles[0], (0.0, 0.999999), sampling=sampling),
                       latents_of(bundles[0], sampling=sampling))


def test_ab2_does_not_look_back_to_the_other_weights(bundles):
    """Of two steps with the adapter in the second, both are of Euler."""
    euler, looking_back = SamplingConfig(num_steps=2), SamplingConfig(num_steps=2, solver="ab2")
    assert torch.equal(latents_of(bundles[0], (0.5, 1.0), sampling=looking_back),
                       latents_of(bundles[0], (0.5, 1.0), sampling=euler))
    assert not torch.equal(latents_of(bundles[0], sampling=looking_back), latents_of(bundles[0], sampling=euler))


def test_long_sounds_know_the_times(tmp_path):
    long = put_features(tmp_path / "long.npz", 9.0)
    whole, base = latents_of(long, long=True), latents_of(long, adapters=[], long=True)
    assert torch.equal(latents_of(long, (0.7, 1.0), long=True), base)
    part = latents_of(long, (0.0, 0.4), long=True)
    assert not torch.equal(part, whole) and not torch.equal(part, base)


def test_adapters_act_in_their_layers_only(bundles):
    adapter = make_adapter()
    names = adapter.layer_names()
    assert torch.equal(latents_of(bundles[0], layers=["*"]), latents_of(bundles[0]))
    part = Adapter({key: value for key, value in adapter.tensors.items() if key.startswith("joint_blocks.")},
                   adapter.meta)
    assert 0 < len(part.layer_names()) < len(names)
    assert torch.equal(latents_of(bundles[0], layers=["joint_blocks.*"]), latents_of(bundles[0], adapters=[part]))
    with pytest.raises(ValueError, match="none of its layers fits ffn"):
        latents_of(bundles[0], layers=["ffn"])


def test_times_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"times is \(0\.7, 0\.2\)"):
        tiny(adapter_times=(0.7, 0.2))
