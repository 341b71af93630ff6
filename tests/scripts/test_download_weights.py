import dataclasses
import functools
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import scripts.download_weights as script
from selva.models.variants import WEIGHT_FILES, get_variant
from selva.weights.find import check_weights

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """The three things about the Hub that a download needs: HEAD, GET, and GET of the rest of a file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {}  # "owner/repo/path": bytes
        self.requests = []  # (method, path, range)
        self.break_after: int | None = None  # bytes after which the next GET loses its connection
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, file, content):
        self.files[f"{file.repo}/{file.remote}"] = content
        return content

    def gets(self, name):
        return [span for method, path, span in self.requests if method == "GET" and path.endswith(name)]


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        span = self.headers.get("Range")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        name = f"{match[1]}/{match[2]}" if match else None
        self.server.requests.append((self.command, name, span))
        if name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.server.files[name]
        match = re.fullmatch(r"bytes=(\d+)-", span or "bytes=0-")
        assert match is not None, span
        start = int(match[1])
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        if self.server.break_after is not None:
            self.wfile.write(content[start : start + self.server.break_after])
            self.server.break_after = None
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with every file of small_16k and small_44k, and a Hugging Face cache of our own."""
    import huggingface_hub

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_url", functools.partial(huggingface_hub.hf_hub_url, endpoint=server.url)
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    for name in ("small_16k", "small_44k", "mmaudio_small_44k"):
        for file in script.needed_files(get_variant(name)):
            content = server.add(file, f"content of {file.name}".encode() * 100)
            if file.name in WEIGHT_FILES and file.md5_verified:
                stand_in = dataclasses.replace(file, md5=hashlib.md5(content).hexdigest())
                monkeypatch.setitem(WEIGHT_FILES, file.name, stand_in)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights here"


def run(folder, variant="small_16k", *arguments):
    return script.main(["--variant", variant, "--selva_dir", str(folder), *arguments])


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("layout", ["comfyui", "selva"])
def test_everything_arrives_under_its_local_name(hub, folder, capsys, layout):
    assert run(folder, "small_44k", "--layout", layout) == 0
    check_weights("small_44k", folder)
    deep, flat = ("ext", ".") if layout == "comfyui" else ("ext_weights", "weights")
    expected = {
        f"{flat}/generator_small_44k_sup_5.pth": "generator_small_44k_sup_5.pth",
        f"{flat}/video_enc_sup_5.pth": "video_enc_sup_5.pth",
        f"{deep}/v1-44.pth": "v1-44.pth",
        f"{deep}/bigvgan_v2_44khz_128band_512x/bigvgan_generator.pt": "bigvgan_generator.pt",
        f"{deep}/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors": "open_clip_model.safetensors",
        f"{deep}/flan-t5-base/model.safetensors": "model.safetensors",
        f"{deep}/flan-t5-base/tokenizer.json": "tokenizer.json",
    }
    for path, name in expected.items():
        assert (folder / path).read_text() == f"content of {name}" * 100
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(folder / path) for path in expected]
    assert "generator_small_44k_sup_5.pth: generator, the publisher never verified its checksum" in output.err
    assert "v1-44.pth: 44.1 kHz VAE, checksum correct" in output.err
    assert not leftovers(folder)
    requested = [path for method, path, _ in hub.requests if method == "GET"]
    assert "jnwnlee/SelVA/weights/generator_small_44khz_sup_5.pth" in requested


def test_the_synchformer_lies_where_each_layout_expects_it(hub, tmp_path):
    for layout, place in (("comfyui", "."), ("selva", "ext_weights")):
        assert run(tmp_path / layout, "mmaudio_small_44k", "--layout", layout) == 0
        assert (tmp_path / layout / place / "synchformer_state_dict.pth").is_file()
        assert not list((tmp_path / layout).rglob("tokenizer.json"))  # this family reads no T5


def test_a_second_run_downloads_nothing(hub, folder):
    assert run(folder) == 0
    hub.requests.clear()
    assert run(folder) == 0
    unchecked = {f"{file.repo}/{file.remote}" for file in script.needed_files(get_variant("small_16k")) if not file.md5}
    assert {(method, name) for method, name, _ in hub.requests} == {("HEAD", name) for name in unchecked}


def test_only_what_is_missing_is_fetched(hub, folder):
    assert run(folder, "small_16k", "--layout", "selva") == 0
    (folder / "ext_weights" / "v1-16.pth").unlink()
    hub.requests.clear()
    assert run(folder) == 0  # the layout is seen from the folder
    assert {path for method, path, _ in hub.requests if method == "GET"} == {"jnwnlee/SelVA/ext_weights/v1-16.pth"}
    assert (folder / "ext_weights" / "v1-16.pth").is_file()


def test_a_partial_download_goes_on_where_it_stopped(hub, folder):
    content = hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"]
    etag = hashlib.sha256(content).hexdigest()
    partial = folder / "ext" / f".v1-16.pth.{hashlib.md5(etag.encode()).hexdigest()[:12]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:700])
    assert run(folder) == 0
    assert hub.gets("v1-16.pth") == ["bytes=700-"]
    assert (folder / "ext" / "v1-16.pth").read_bytes() == content
    assert not leftovers(folder)


def test_the_process_may_die_and_the_next_one_goes_on(hub, folder, monkeypatch):
    """The first run dies while writing; what it had is used by the second."""
    import huggingface_hub.file_download

    real = huggingface_hub.file_download.http_get

    def dies_in_the_middle(url, stream, **options):
        if "v1-16" in url:
            stream.write(hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"][:500])
            raise KeyboardInterrupt
        real(url, stream, **options)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", dies_in_the_middle)
        assert run(folder) == 130
    assert not (folder / "ext" / "v1-16.pth").exists()
    assert run(folder) == 0
    assert hub.gets("v1-16.pth") == ["bytes=500-"]


def test_a_lost_connection_is_resumed(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)  # 10 MB: pieces that are kept whole
    hub.break_after = 300  # the first file
    if run(folder) != 0:  # old versions of huggingface_hub leave it to the next run
        assert run(folder) == 0
    assert hub.gets("generator_small_16k_sup_5.pth") == [None, "bytes=300-"]


def test_the_beginning_of_an_older_version_is_not_continued(hub, folder):
    stale = folder / "ext" / ".v1-16.pth.0123456789ab.partial"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"something else")
    assert run(folder) == 0
    assert hub.gets("v1-16.pth") == [None]
    assert not leftovers(folder)


def test_a_wrong_checksum_is_tried_twice_and_then_an_error(hub, folder, capsys):
    """Pitfall H2."""
    good = hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"]
    hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"] = b"tampered"
    assert run(folder) == 1
    assert len(hub.gets("v1-16.pth")) == 2
    output = capsys.readouterr()
    assert f"expected {hashlib.md5(good).hexdigest()}" in output.err
    assert "missing: 1 file: v1-16.pth" in output.err
    assert not (folder / "ext" / "v1-16.pth").exists() and not leftovers(folder)
    assert len(output.out.splitlines()) == 6  # the others arrived


def test_a_damaged_local_file_is_replaced_in_its_place(hub, folder):
    assert run(folder) == 0
    (folder / "ext" / "v1-16.pth").rename(folder / "v1-16.pth")
    (folder / "v1-16.pth").write_bytes(b"truncated")
    assert run(folder) == 0
    assert (folder / "v1-16.pth").read_bytes() == hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"]
    assert not (folder / "ext" / "v1-16.pth").exists()


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("spoil", [lambda data: data[:-100], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_a_damaged_file_without_a_checksum_is_compared_with_the_hub(hub, folder, capsys, name, spoil):
    assert run(folder) == 0
    (path,) = folder.rglob(name)
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    assert run(folder) == 0 and path.read_bytes() == good
    assert "on the Hub" in capsys.readouterr().err


def test_small_files_have_the_hash_of_git_there(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert script._git_hash(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_without_the_hub_a_file_without_a_checksum_is_not_compared_and_that_is_said(hub, folder, capsys, monkeypatch):
    assert run(folder) == 0
    hub.files.clear()
    assert run(folder) == 0 and "is not compared with the Hub" in capsys.readouterr().err


def test_a_damaged_local_file_survives_a_failing_download(hub, folder):
    assert run(folder) == 0
    (folder / "ext" / "v1-16.pth").write_bytes(b"truncated")
    del hub.files["jnwnlee/SelVA/ext_weights/v1-16.pth"]
    assert run(folder) == 1
    assert (folder / "ext" / "v1-16.pth").read_bytes() == b"truncated"


def test_a_file_of_a_neighbouring_extension_is_kept_unchecked(hub, tmp_path):
    neighbour = tmp_path / "models" / "prismaudio" / "synchformer_state_dict.pth"
    neighbour.parent.mkdir(parents=True)
    neighbour.write_bytes(b"another edition")
    assert run(tmp_path / "models" / "selva", "mmaudio_small_44k") == 0
    assert neighbour.read_bytes() == b"another edition"
    assert hub.gets("synchformer_state_dict.pth") == []


def test_an_alternative_name_is_tried_when_the_first_does_not_exist(hub, folder):
    del hub.files["apple/DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors"]
    hub.files["apple/DFN5B-CLIP-ViT-H-14-384/open_clip_pytorch_model.bin"] = b"old format"
    assert run(folder) == 0
    clip = folder / "ext" / "DFN5B-CLIP-ViT-H-14-384"
    assert [path.name for path in clip.iterdir()] == ["open_clip_pytorch_model.bin"]
    check_weights("small_16k", folder)


@pytest.mark.parametrize("name, other", [
    ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"), ("pytorch_model.bin", "model.safetensors"),
])
@pytest.mark.parametrize("old", [b"truncated", "the other format"])
def test_a_damaged_file_of_an_alternative_name_is_replaced_by_its_own_format(hub, folder, name, other, old):
    """A .bin with the content of the .safetensors would be refused by the loader, and fetched again by every run."""
    (key,) = [key for key in hub.files if key.endswith(f"/{other}")]
    hub.files[key.removesuffix(other) + name] = b"old format"
    assert run(folder) == 0
    (path,) = folder.rglob(other)
    path.rename(path.with_name(name)).write_bytes(hub.files[key] if old == "the other format" else old)
    for gets in ([None], []):  # the second run has nothing to do
        hub.requests.clear()
        assert run(folder) == 0
        assert path.with_name(name).read_bytes() == b"old format" and not path.exists()
        assert hub.gets(name) == gets and not hub.gets(other)
    check_weights("small_16k", folder)


def test_a_file_that_does_not_exist_is_named_and_the_others_arrive(hub, folder, capsys):
    del hub.files["google/flan-t5-base/tokenizer.json"]
    assert run(folder) == 1
    output = capsys.readouterr()
    assert "tokenizer.json (FLAN-T5 tokenizer): repository google/flan-t5-base has no tokenizer.json" in output.err
    assert len(output.out.splitlines()) == 6


def test_a_full_disk_is_noticed_before_the_download(hub, folder, capsys, monkeypatch):
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage)
    assert run(folder) == 1
    assert "are free" in capsys.readouterr().err
    assert not any(method == "GET" for method, _, _ in hub.requests)


def test_the_list_needs_no_network(hub, folder, capsys):
    assert run(folder) == 0
    (folder / "ext" / "best_netG.pt").unlink()
    hub.requests.clear()
    capsys.readouterr()
    assert run(folder, "small_16k", "--list") == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows].count("present") == 6
    assert ["missing", "best_netG.pt", "16 kHz vocoder (BigVGAN)", "jnwnlee/SelVA"] in rows
    assert hub.requests == []


def test_the_built_in_variant_needs_nothing(capsys):
    assert script.main(["--variant", "tiny_16k"]) == 0
    assert "built in" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--variant", "small_16k"], ["--variant", "huge"], []])
def test_wrong_usage_ends_with_two(arguments):
    assert script.main(arguments) == 2


def test_environment_variables_of_the_hub_are_honoured(hub, folder, tmp_path):
    """In a process of its own, because the library reads them when it is imported."""
    # The tiny stand-in files fail the real checksums, except those without one.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "scripts.download_weights", "--variant", "small_44k", "--selva_dir", str(folder)]

    def start(**extra):
        return subprocess.run(command, cwd=ROOT, env={**environment, **extra}, capture_output=True, text=True)

    offline = start(HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    assert "missing: 7 files" in offline.stderr and hub.requests == []
    online = start()
    assert online.returncode == 1 and "Traceback" not in online.stderr
    assert "missing: 2 files: video_enc_sup_5.pth, v1-44.pth" in online.stderr
    assert (folder / "generator_small_44k_sup_5.pth").is_file()
