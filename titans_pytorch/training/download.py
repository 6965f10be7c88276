"""enwik8 from its public address: once, resumable, verified."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import COPY_BYTES, disk_errors, sha256, writing

ADDRESS = "https://mattmahoney.net/dc/enwik8.zip"
LENGTH = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
TIMEOUT_S = 10.0  # seconds without an answer


class Unreachable(SettingsError):
    """A file that is not there and cannot be fetched."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def enwik8(folder: Path, address: str = ADDRESS, length: int = LENGTH, digest: str = SHA256) -> Path:
    """The unpacked file, downloaded if it is not there."""
    path, archive = folder / "enwik8", folder / "enwik8.zip"
    if path.exists():
        check(path, length, digest)
        return path
    if not archive.exists():
        try:
            fetch(address, archive)
        except (OSError, http.client.HTTPException) as error:
            why = str(getattr(error, "reason", error) or type(error).__name__)
            raise Unreachable(
                f"enwik8 cannot be fetched from {address} ({why}): fetch it on another machine, put enwik8.zip or the "
                f"unpacked enwik8 into {folder}, and start again (what has arrived is kept and resumed)",
                why,
            ) from None
    unpack(archive, path, length, digest)
    archive.unlink()
    return path


def fetch(address: str, path: Path) -> None:
    """Download to a file, going on where an earlier attempt stopped."""
    part = path.with_name(path.name + ".part")
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing is left to send
            raise
        os.replace(part, path)
        return
    with answer:
        have = have if answer.status == 206 else 0  # servers may ignore the range
        expected = have + int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(total=expected or None, initial=have, unit="B", unit_scale=True, desc=f"downloading {path.name}")
        with part.open("ab" if have else "wb") as file, bar:
            while piece := answer.read(COPY_BYTES):
                with disk_errors(part):
                    file.write(piece)
                bar.update(len(piece))
    if expected and part.stat().st_size < expected:
        raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {expected:,} bytes")
    os.replace(part, path)


def unpack(archive: Path, path: Path, length: int, digest: str) -> None:
    """The one file of a zip archive, verified before it appears at its place."""
    seen, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(archive) as opened, opened.open("enwik8") as source, writing(path) as temporary:
            with temporary.open("wb") as file:
                while piece := source.read(COPY_BYTES):
                    file.write(piece)
                    seen.update(piece)
                    size += len(piece)
            if (size, seen.hexdigest()) != (length, digest):
                raise SettingsError(wrong(archive, size, length))
    except (zipfile.BadZipFile, KeyError, EOFError):
        archive.unlink(missing_ok=True)
        raise SettingsError(
            f"{archive} must be the zip archive with enwik8, got another file: it was removed"
        ) from None
    except SettingsError as error:
        if "sha256" in str(error):
            archive.unlink(missing_ok=True)
        raise


def check(path: Path, length: int, digest: str) -> None:
    """Length always, the sum once: a mark beside the file says that it was right."""
    mark, about = path.with_name(path.name + ".verified"), f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    if mark.exists() and mark.read_text() == about:
        return
    if path.stat().st_size != length or sha256(path) != digest:
        raise SettingsError(wrong(path, path.stat().st_size, length))
    try:
        mark.write_text(about)
    except OSError:  # a folder that only others may write to: then it is summed each time
        return


def wrong(path: Path, size: int, length: int) -> str:
    return f"{path} must hold the {length:,} bytes of enwik8 with their sha256, got {size:,} bytes or others: remove it"
