"""The whole of Synchformer: golden outputs at full size; what it refuses."""

from __future__ import annotations

import pytest
import torch

from selva.models.config import VideoEncoderConfig
from selva.models.synchformer_av import SynchformerAV, _tables, segment_mels
from selva.utils.errors import UserError

SMALL = VideoEncoderConfig(embed_dim=32, depth=1, num_heads=4, mlp_dim=48, image_size=32)


@pytest.mark.slow  # draws 950 MB of weights and computes 24 segments of both branches
@torch.inference_mode()
def test_golden_synchformer_av(golden):
    case = golden("synchformer_av")
    network = SynchformerAV().eval().load_published(case.weights())
    inputs = case.inputs()
    waveforms = torch.cat((inputs["waveform_a"], inputs["waveform_b"]))
    window, bank = _tables(waveforms.device)
    mels, inner = segment_mels(waveforms), {}

    def keep(name):  # a hook that returned something would replace the output
        def hook(_module, _args, output):
            inner.setdefault(name, output)

        return hook

    trunk, comparison = network.afeat_extractor, network.transformer
    places = {"layer_0": trunk.ast.encoder["layer"][0], "norm": trunk.ast.layernorm, "block_0": comparison.blocks[0],
              "ln_f": comparison.ln_f}
    hooks = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    logits = network.compare(inputs["vis_features"], inputs["aud_features"])
    audio = network.encode_audio(waveforms)
    visual = network.encode_video(inputs["frames"], segment_batch=4)
    for hook in hooks:
        hook.remove()

    values = {
        "window": window, "filterbank": bank, "mel": mels, "audio_features": audio, "audio_features_thin": audio,
        "visual_features": visual, "visual_features_thin": visual, "logits_from_features": logits,
        "inner_audio_embedding": trunk.ast.embeddings(mels[0, :1]), "inner_audio_layer_0": inner["layer_0"][:1],
        "inner_audio_norm": inner["norm"][:1], "inner_transformer_block_0": inner["block_0"],
        "inner_transformer_norm": inner["ln_f"][:, :1],
        "logits_first": network.compare(visual[:, :14].expand(2, -1, -1, -1), audio[:, :14]),
        "logits_last": network.compare(visual[:, -14:].expand(2, -1, -1, -1), audio[:, -14:]),
    }
    for name, value in values.items():
        case.check(name, value)


def test_what_does_not_fit_is_refused():
    network = SynchformerAV(SMALL).eval()
    with pytest.raises(UserError, match="10240"):
        network.encode_audio(torch.zeros(1, 10239))
    audio, visual = network.encode_audio(torch.zeros(1, 80000)), network.encode_video(torch.zeros(1, 120, 3, 32, 32))
    assert audio.shape == (1, 14, 6, 32) and visual.shape == (1, 14, 8, 32)
    assert network.compare(visual, audio).shape == (1, 21)
    with pytest.raises(UserError, match="13 segments"):
        network.compare(visual[:, :13], audio)
    weights = network.state_dict()
    del weights["aproj.bias"]
    with pytest.raises(UserError, match=r"1 missing: aproj\.bias"):
        network.load_published(weights)
