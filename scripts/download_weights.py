"""Fetch the published weights of one variant from the Hugging Face Hub.

    python scripts/download_weights.py --variant large_44k --selva_dir models/selva
    python scripts/download_weights.py --variant small_16k --selva_dir models/selva --list

Good files that are there already, in either layout or in the Hugging Face cache, are kept. An interrupted download goes
on where it stopped. Checksums are compared where the publisher gives one. Prints the path of every file.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.models.variants import VARIANTS, Variant, WeightFile, get_variant
from selva.utils.errors import UserError
from selva.utils.files import source_hash
from selva.utils.text import counted
from selva.weights.find import LAYOUTS, NEIGHBOUR, default_layout, find_file, local_path

log = logging.getLogger("selva.download_weights")

ATTEMPTS = 2  # a file that arrives with a wrong checksum is fetched once more
GB = 1e9


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--variant", required=True, choices=VARIANTS, metavar="NAME",
                        help=f"one of {', '.join(VARIANTS)}")
    parser.add_argument("--selva_dir", type=Path, metavar="DIR", help="folder of the weights, created if needed")
    parser.add_argument("--layout", choices=LAYOUTS,
                        help="how to arrange new files; if not given, as the folder is, else comfyui")
    parser.add_argument("--list", action="store_true", help="only say what is needed and what is there")
    parser.add_argument("--debug", action="store_true", help="show debug messages and the traceback of an error")
    return parser


def needed_files(variant: Variant) -> list[WeightFile]:
    """Return all files of a variant, each once."""
    return list(dict.fromkeys(file for part in variant.parts for file in variant.weight_files(part)))


def md5_of(path: Path) -> str:
    """Return the MD5 of a file in hexadecimal digits; reads it once, in pieces."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def has_wrong_md5(file: WeightFile, path: Path) -> bool:
    """Return True where ``path`` contradicts the published checksum of ``file``; False where there is none to trust."""
    return file.md5 is not None and file.md5_verified and md5_of(path) != file.md5


def hub_problem(file: WeightFile, path: Path, remote: str | None = None) -> str:
    """Return the difference of a file from the one on the Hub, in size or hash; "" for none, or where nothing is known.

    Only files without a checksum of their own are compared. Large files have a SHA-256 there, small ones Git's SHA-1.

    Args:
        remote: name on the Hub; None is the one that the file's own name says.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.md5 is not None and file.md5_verified:
        return ""
    remote = remote or next((name for name in file.alternatives if Path(name).name == path.name), file.remote)
    try:
        metadata = get_hf_file_metadata(hf_hub_url(file.repo, remote))
    except network_errors() as error:
        reason = " ".join(str(error).split())
        log.warning("%s: is not compared with the Hub, which cannot be reached (%s)", path, reason)
        return ""
    size, etag = path.stat().st_size, str(metadata.etag)
    if metadata.size is not None and size != metadata.size:
        return f"has {counted(size, 'byte')}, on the Hub {metadata.size}"
    found = {64: lambda: source_hash(path), 40: lambda: _git_hash(path)}.get(len(etag), lambda: etag)()
    return "" if found == etag else f"has the hash {found[:12]}..., on the Hub {etag[:12]}..."


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def describe_check(file: WeightFile, path: Path) -> str:
    """Return a note on the checksum of ``path``, which passed :func:`has_wrong_md5` and :func:`hub_problem`."""
    if file.md5 is None:
        return "no checksum is published beside it"
    if file.md5_verified:
        return "checksum correct"
    outcome = "equal" if md5_of(path) == file.md5 else "not equal"
    return f"the publisher never verified its checksum ({outcome} here)"


def fetch(file: WeightFile, target: Path) -> Path:
    """Download ``file`` to ``target``, or to a neighbour of another of its names, and return the path.

    The names differ in their format (``.safetensors``, ``.bin``), so each holds the content of that name on the Hub;
    that of ``target`` is tried first.

    Raises:
        ValueError: the checksum is wrong even after a second download.
        OSError: the file does not exist there, the Hub cannot be reached, or the disk is full.
    """
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    places = {file.remote: target.with_name(file.name)}  # "44khz" there may be "44k" here
    places |= {remote: target.with_name(remote) for remote in file.alternatives}
    for remote, place in sorted(places.items(), key=lambda item: item[1] != target):
        try:
            return _fetch_checked(file, remote, place)
        except LocalEntryNotFoundError:  # cannot be reached; a subclass of "does not exist"
            raise
        except EntryNotFoundError:
            log.debug("%s has no %s", file.repo, remote)
    raise FileNotFoundError(f"repository {file.repo} has no {' or '.join(places)}")


def _fetch_checked(file: WeightFile, remote: str, target: Path) -> Path:
    for _ in range(ATTEMPTS):
        partial = download(file.repo, remote, target)
        if not has_wrong_md5(file, partial) and not hub_problem(file, partial, remote):
            os.replace(partial, target)
            for outdated in target.parent.glob(f".{target.name}.*.partial"):
                outdated.unlink()  # beginnings of earlier versions
            return target
        log.warning("%s arrived with a wrong checksum", target.name)
        found = md5_of(partial)
        partial.unlink()
    expected = f", expected {file.md5}" if file.md5 else ", which is not that of the file on the Hub"
    raise UserError(f"{target.name} from {file.repo} has the MD5 {found}{expected}; downloaded {ATTEMPTS} times")


def download(repo: str, remote: str, target: Path) -> Path:
    """Return the complete content of one file of the Hub under a hidden name beside ``target``, not yet checked.

    The hidden name holds the version of the remote file, and a second call goes on where the first one stopped.
    (``hf_hub_download`` of huggingface_hub 2 starts from nothing in every process, which is why it is not used.)
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, remote)
    remote_file = get_hf_file_metadata(url)
    version = hashlib.md5(str(remote_file.etag).encode(), usedforsecurity=False).hexdigest()[:12]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{version}.partial")
    present = partial.stat().st_size if partial.exists() else 0
    if remote_file.size is not None:
        if present > remote_file.size:  # not a beginning of this file
            partial.unlink()
            present = 0
        _check_disk_space(target.parent, remote_file.size - present)
        log.info("%s: %.2f GB, %.2f GB of it are there", target.name, remote_file.size / GB, present / GB)
    headers = build_hf_headers()
    if urlsplit(remote_file.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the Hub, not for the file server it points to
    with open(partial, "ab") as stream:
        http_get(
            remote_file.location, stream, resume_size=present, headers=headers, expected_size=remote_file.size,
            displayed_filename=target.name,
        )
        stream.flush()
        os.fsync(stream.fileno())
    return partial


def _check_disk_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(f"{folder}: {num_bytes / GB:.2f} GB are needed, {free / GB:.2f} GB are free")


def network_errors() -> tuple[type[Exception], ...]:
    """Return the errors that a download may raise, for every HTTP library that huggingface_hub is built on."""
    from huggingface_hub.utils import HfHubHTTPError

    # Its errors are OSErrors, and so are those of `requests` below old versions; those of `httpx` below new ones are
    # not, but the Hub's own error derives from their common base.
    return (OSError, ValueError, HfHubHTTPError.__bases__[0])


def list_files(variant: Variant, selva_dir: Path | None) -> int:
    """Print one line per needed file, tab separated: present or missing, path or name, purpose, repository."""
    for file in needed_files(variant):
        path = find_file(file, selva_dir)
        print("missing" if path is None else "present", path or file.name, file.purpose, file.repo, sep="\t")
    return 0


def download_all(variant: Variant, selva_dir: Path, layout: str) -> int:
    """Bring every file of the variant into place and return the exit code."""
    failed = []
    for file in needed_files(variant):
        path = find_file(file, selva_dir)
        # A file that another extension brought into its own folder is used as it is.
        target = local_path(file, selva_dir, layout)
        if path is not None and path.parent.name != NEIGHBOUR:
            problem = "has a wrong checksum" if has_wrong_md5(file, path) else hub_problem(file, path)
            if problem:
                log.warning("%s %s and is downloaded again", path, problem)
                target, path = path, None
        try:
            if path is None:
                path = fetch(file, target)
            log.info("%s: %s, %s", file.name, file.purpose, describe_check(file, path))
            print(path, flush=True)
        except network_errors() as error:
            log.error("%s (%s): %s", file.name, file.purpose, " ".join(str(error).split()))
            failed.append(file.name)
    if failed:
        log.error("missing: %s: %s; the same command goes on from here", counted(len(failed), "file"),
                  ", ".join(failed))
        return cli.EXIT_FAILED
    return 0


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    variant = get_variant(args.variant)
    if variant.packaged:
        log.info("%s is built in and needs no files", variant.name)
        return 0
    if args.list:
        return list_files(variant, args.selva_dir)
    if args.selva_dir is None:
        raise cli.UsageError("--selva_dir is missing: the folder to put the weights into")
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return download_all(variant, args.selva_dir, args.layout or default_layout(args.selva_dir))


if __name__ == "__main__":
    sys.exit(main())
