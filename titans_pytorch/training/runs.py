"""A run is a folder: its settings, its logs, its samples, its checkpoints, its pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import titans_pytorch.training.models  # noqa: F401  its classes are named in runs
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.public_names import class_of
from titans_pytorch.training.checkpoints import Checkpoint, best, last, safetensors_only
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import disk_errors, flush, writing
from titans_pytorch.training.text import Text, text_of

CONFIG, METRICS, SAMPLES, TEXT = "config.json", "metrics.jsonl", "samples.txt", "text.txt"
TOKENIZER = "tokenizer.json"
LOGS = (METRICS, SAMPLES)


@dataclass
class Run:
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save_config(self, config: Mapping[str, Any]) -> None:
        with writing(self.folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

    def save_tokenizer(self, path: str | None) -> None:
        """A copy of the tokenizer, without which the model's tokens mean nothing; None: there is none."""
        if path is None or (self.folder / TOKENIZER).exists():
            return
        with writing(self.folder / TOKENIZER) as temporary:
            temporary.write_bytes(Path(path).read_bytes())

    def text_kind(self) -> Text:
        """How the run's model sees text."""
        path, has_one = self.folder / TOKENIZER, self.config()["training"].get("tokenizer") is not None
        if has_one and not path.exists():
            raise SettingsError(f"{self.folder} must hold the {TOKENIZER} that the run was started with, got none")
        return text_of(path if has_one else None)

    def save_text(self, text: bytes) -> None:
        """What pictures show the surprise in."""
        with writing(self.folder / TEXT) as temporary:
            temporary.write_bytes(text)

    def text(self) -> bytes:
        try:
            return (self.folder / TEXT).read_bytes()
        except OSError:
            raise SettingsError(f"{self.folder} has no {TEXT} to draw: name a file with --text") from None

    def config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise SettingsError(f"{self.folder} must be the folder of a run, got one without {CONFIG}") from None
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} must be the settings of a run, got what cannot be read: {error}") from None
        if not isinstance(config, dict) or not {"script", "model", "training"} <= set(config):
            raise SettingsError(f"{path} must be the settings of a run, got something else")
        return config

    def log(self, record: Mapping[str, Any]) -> None:
        self.append(METRICS, json.dumps(record) + "\n")

    def append(self, name: str, text: str) -> None:
        with disk_errors(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def lengths(self) -> dict[str, int]:
        """How long the logs are, in bytes, once the disk has them."""
        for name in LOGS:
            if (self.folder / name).exists():
                flush(self.folder / name)
        return {name: length(self.folder / name) for name in LOGS}

    def rewind(self, lengths: Mapping[str, int]) -> None:
        """Cut from the logs what was written after a checkpoint: it is going to be written again."""
        for name in LOGS:
            path = self.folder / name
            if path.exists() and path.stat().st_size > (kept := lengths.get(name, 0)):
                with path.open("r+b") as file:
                    file.truncate(kept)

    def metrics(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off by the end of the process is left out."""
        path = self.folder / METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        records = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise SettingsError(
                        f"{path} must hold one record a line, got something else in line {number}"
                    ) from None
        return records

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No two processes write to one run; the lock goes with the process that holds it."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                message = f"{self.folder} is being trained by another process: wait for it or stop it"
                raise SettingsError(message) from None
            yield

    def model(self, which: str = "best") -> tuple[Any, Checkpoint]:
        """The trained model, of the best or the last checkpoint."""
        config = self.config()
        find = {"best": best, "last": last}[which]
        if (found := find(self.checkpoints)) is None:
            raise SettingsError(f"{self.folder} has no checkpoint yet")
        kind = model_class(config.get("model_class", ""))
        with redirect_stdout(StringIO()), safetensors_only(found.path):  # the hub says what it loads
            return kind.from_pretrained(found.path), found


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def model_class(name: str) -> type[Pretrained]:
    """The class of a run's model by its public name: nothing else is loaded, since a run may come from anywhere."""
    try:
        found = class_of(name)
    except ValueError:
        found = None
    if found is None or not issubclass(found, Pretrained):
        raise SettingsError(f"{CONFIG} must name a model of titans_pytorch as model_class, got {name!r}")
    return found


def new_folder(root: Path, script: str) -> Path:
    """Named after the script and the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    candidates = [root / f"{script}-{stamp}", *(root / f"{script}-{stamp}-{i}" for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def newest(root: Path, script: str) -> Path:
    found = [path.parent for path in root.glob(f"*/{CONFIG}") if Run(path.parent).config()["script"] == script]
    if not found:
        raise SettingsError(f"--resume needs a run of this script, got none in {root}: name it with --folder")
    return max(found, key=lambda path: (path / CONFIG).stat().st_mtime)
