"""selva.extraction.extract: the work list of an extraction."""

from __future__ import annotations

import pytest

from selva.extraction.config import ExtractionConfig
from selva.extraction.extract import work_list


@pytest.mark.parametrize("written", ["", "null", "NaN"])
def test_clips_of_a_memmap_have_prompts_that_mmaudio_can_read(tmp_path, written, caplog):
    """Without one they take the name of the output folder, as clips in a folder do when they are trained on."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(b"")
    (tmp_path / "clips.tsv").write_text(f"id\tpath\tprompt\nx\ta.mp4\ta bell\ny\tb.mp4\t{written}\n")

    def prompts(output_format: str) -> list[str]:
        config = ExtractionConfig(inputs=[tmp_path / "clips.tsv"], output_dir=tmp_path / "gongs", format=output_format)
        return [job.prompt for job in work_list(config)]

    assert prompts("memmap") == ["a bell", "gongs"]
    assert f"the folder's name, 'gongs', is the prompt: 1 of 2 clips: y ({written!r})" in caplog.text
    assert prompts("npz") == ["a bell", written]
