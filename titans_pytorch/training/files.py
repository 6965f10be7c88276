"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titans_pytorch.training.errors import SettingsError

COPY_BYTES = 1 << 20
UNFINISHED = ".unfinished-"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file or folder to be made at the place that is given; it appears at `path` once it is whole."""
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{uuid.uuid4().hex[:8]}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            for each in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
                flush(each)
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        except BaseException:
            remove(temporary)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What a disk complains about, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SettingsError(f"no space left on the disk to write {path}: what was there before is intact") from None
        raise SettingsError(f"{path} cannot be written: {error.strerror or error}") from None
    except Exception as error:
        # safetensors wraps what the system said into an error of its own
        if "No space left" in str(error):
            raise SettingsError(f"no space left on the disk to write {path}: what was there before is intact") from None
        raise


def flush(path: Path) -> None:
    """Make the disk have it."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
