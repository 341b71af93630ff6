"""Small models of transformers for tests, written as the folders that users have: CLAP, AST, and a Whisper that says
given words whatever it hears."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

Words = Sequence[tuple[float, float, str]]  # start and end in seconds, text
SAID: Words = ((0.0, 2.0, " Hello there."), (2.0, 2.4, " Yes."), (4.0, 6.0, " Good bye."))
TIMES = 1501  # tokens for 0.00, 0.02 ... 30.00 s


def put_clap(folder: Path) -> Path:
    """Write a random CLAP that reads letters."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    audio = {"hidden_size": 8, "patch_embeds_hidden_size": 4, "depths": [1, 1], "num_attention_heads": [1, 1],
             "num_hidden_layers": 2, "num_mel_bins": 64, "spec_size": 256, "window_size": 8, "num_classes": 3,
             "projection_dim": 16}
    text = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "projection_dim": 16}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(folder)
    characters = {chr(code): code - 28 for code in range(33, 127)}
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "Ġ": 200, **characters}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc")
    transformers.ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def put_ast(folder: Path) -> Path:
    """Write a random audio spectrogram transformer of seven classes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    max_length=128, num_labels=7)
    transformers.ASTForAudioClassification(config).save_pretrained(folder)
    transformers.ASTFeatureExtractor(max_length=128).save_pretrained(folder)
    return folder


def put_whisper(folder: Path, said: Words = SAID, language: str = "en", multilingual: bool = True) -> Path:
    """Write a Whisper that says these words in every 30 s of sound, and hears this language.

    Its decoder listens to nothing: the vector of each position is made so that the next token of the script is the
    likeliest by far. All of Whisper's own rules about tokens, times and windows stay in force.
    """
    import transformers
    from tokenizers import AddedToken, pre_tokenizers

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>",
               "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    ids = {name: len(alphabet) + number for number, name in enumerate(special)}
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | ids
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.add_tokens([AddedToken(f"<|{number * 0.02:.2f}|>", special=False) for number in range(TIMES)])
    first_time = len(alphabet) + len(special)
    assert tokenizer.convert_tokens_to_ids("<|0.00|>") == first_time

    script: list[int] = []
    for start, end, text in said:
        letters = tokenizer(text, add_special_tokens=False).input_ids
        script += [first_time + round(start / 0.02), *letters, first_time + round(end / 0.02)]
    script.append(ids["<|endoftext|>"])
    # Between <|startoftranscript|> and the words: the language and the task, where there is a choice.
    wanted = [*([ids[f"<|{language}|>"], ids["<|transcribe|>"]] if multilingual else []), *script]
    config = transformers.WhisperConfig(
        vocab_size=first_time + TIMES, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=16,
        max_target_positions=len(wanted) + 8, decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"],
        begin_suppress_tokens=None, suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    decoder = model.model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_()
        for layer in decoder.layers:
            for last in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                last.weight.zero_()
                last.bias.zero_()
        decoder.embed_positions.weight.zero_()
        decoder.embed_positions.weight[: len(wanted)] = 20 * decoder.embed_tokens.weight[wanted]
    rules = {
        "is_multilingual": multilingual, "no_timestamps_token_id": ids["<|notimestamps|>"],
        "max_initial_timestamp_index": 50, "prev_sot_token_id": ids["<|startofprev|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"], "max_length": config.max_target_positions,
        "eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
    }
    if multilingual:
        rules["lang_to_id"] = {"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]}
        rules["task_to_id"] = {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")}
    model.generation_config = transformers.GenerationConfig(**rules)
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder
