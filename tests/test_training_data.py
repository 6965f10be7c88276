"""Where text comes from, how it is split, and that batches depend on nothing but their numbers."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import lzma
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from titans_pytorch.training import data, download
from titans_pytorch.training.errors import SettingsError

TEXT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
DIGEST = hashlib.sha256(TEXT).hexdigest()


def archive(text: bytes, name: str = "enwik8") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, text)
    return packed.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from where it is asked to if `takes_ranges`, and hangs up after `at_most` bytes."""

    content, takes_ranges, at_most = b"", True, 1 << 30
    asked: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.takes_ranges else 0
        rest = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.at_most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[type[Server]]:
    class Fresh(Server):
        content, asked = archive(TEXT), []

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    Fresh.address = f"http://127.0.0.1:{running.server_port}/enwik8.zip"  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield Fresh
    running.shutdown()
    thread.join()
    running.server_close()


def fetched(folder: Path, server: type[Server]) -> Path:
    return download.enwik8(folder, server.address, len(TEXT), DIGEST)  # type: ignore[attr-defined]


def test_enwik8_is_fetched_once(tmp_path: Path, server: type[Server]) -> None:
    for _ in range(2):
        assert fetched(tmp_path, server).read_bytes() == TEXT
    assert server.asked == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enwik8", "enwik8.verified"]


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_a_download_goes_on_where_it_was_cut_off(takes_ranges: bool, tmp_path: Path, server: type[Server]) -> None:
    server.at_most, server.takes_ranges = 100_000, takes_ranges
    with pytest.raises(SettingsError, match=r"put enwik8.zip .* into .* and start again"):
        fetched(tmp_path, server)
    assert not (tmp_path / "enwik8").exists()
    server.at_most = 1 << 30
    assert fetched(tmp_path, server).read_bytes() == TEXT
    assert server.asked[-1] == "bytes=100000-"


def test_wrong_content_is_refused(tmp_path: Path, server: type[Server]) -> None:
    server.content = archive(TEXT[:-1] + b"?")
    with pytest.raises(SettingsError, match="sha256"):
        fetched(tmp_path, server)
    assert not (tmp_path / "enwik8").exists()
    server.content = b"not a zip"
    with pytest.raises(SettingsError, match="must be the zip archive"):
        fetched(tmp_path, server)


def test_a_file_that_somebody_put_there_is_verified(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(TEXT[:100])
    with pytest.raises(SettingsError, match="must hold the 300,000 bytes"):
        download.enwik8(tmp_path, "http://127.0.0.1:9/", len(TEXT), DIGEST)


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be fetched .* put enwik8.zip or the unpacked enwik8 into"):
        download.enwik8(tmp_path, "http://127.0.0.1:9/enwik8.zip")


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz"), (bytes, "")])
def test_any_file_packed_or_not(pack: object, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(pack(TEXT))  # type: ignore[operator]
    for _ in range(2):
        found = data.corpus(str(path), tmp_path / "data")
        assert bytes(found.train) == TEXT[:270_000]
        assert bytes(found.valid) == TEXT[270_000:285_000]
        assert isinstance(found.train.base, np.memmap)
    path.write_bytes(pack(TEXT[::-1]))  # type: ignore[operator]
    assert bytes(data.corpus(str(path), tmp_path / "data").train) == TEXT[::-1][:270_000]


@pytest.mark.parametrize("content", [b"not packed", gzip.compress(TEXT)[:-1000]])
def test_a_file_that_does_not_unpack(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"must be a whole .gz file"):
        data.corpus(str(path), tmp_path / "data")
    assert not any((tmp_path / "data").rglob("*text*"))


def test_without_a_name_it_is_enwik8_where_that_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.download, "enwik8", lambda folder: folder / "enwik8")
    assert data.choose_data(None, tmp_path) == ("enwik8", "; --data FILE trains on something else")
    assert data.choose_data("python", tmp_path) == ("python", "")


def test_without_a_network_it_is_python_s_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = partial(download.enwik8, address="http://127.0.0.1:9/enwik8.zip")
    monkeypatch.setattr(data.download, "enwik8", elsewhere)
    name, why = data.choose_data(None, tmp_path)
    assert name == "python"
    assert "enwik8 cannot be fetched (" in why


def test_the_default_text_is_split_by_file(tmp_path: Path) -> None:
    found = data.corpus("python", tmp_path)
    assert len(found.train) > 20 * len(found.valid) > 1_000_000
    again = data.corpus("python", tmp_path)
    for part, starts in ((again.train, again.train_starts), (again.valid, again.valid_starts)):
        assert starts is not None
        assert starts[0] == 0
        assert len(starts) > 20
        assert (np.diff(np.append(starts, len(part))) >= 0).all()
        before = part[starts[starts > 0] - 1]  # files end with a line
        assert (before == ord("\n")).mean() > 0.95


def test_no_file_is_in_both_parts(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"m{i}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("left out")
    sources = data.library_sources(tmp_path)
    assert 4 < [part for part, _ in sources].count("valid") < 20
    assert sorted(text for _, text in sources) == sorted(f"m{i}\n".encode() for i in range(200))


def test_batches_depend_on_their_numbers_only() -> None:
    text = np.frombuffer(TEXT, dtype=np.uint8)

    def ids(**changed: int) -> torch.Tensor:
        return data.batch(text, **(dict(seed=0, step=3, index=1, size=2, length=9) | changed))

    torch.manual_seed(1)
    first = ids()
    torch.manual_seed(2)
    np.random.seed(3)
    assert torch.equal(ids(), first)
    for changed in (dict(seed=1), dict(step=4), dict(index=2)):
        assert not torch.equal(ids(**changed), first)
    assert all(bytes(row.tolist()) in TEXT for row in first)


def test_every_start_can_be_drawn() -> None:
    text = np.arange(5, dtype=np.uint8)
    drawn = data.batch(text, seed=0, step=0, index=0, size=200, length=4)
    assert sorted({tuple(row) for row in drawn.tolist()}) == [(0, 1, 2, 3), (1, 2, 3, 4)]


def test_validation_sequences_are_spread_over_the_text() -> None:
    assert data.evenly(np.zeros(100, dtype=np.uint8), 4, 10).tolist() == [0, 30, 60, 90]


# ---- files of documents


DOCUMENTS = [f"Document {number}: é{'x' * number}" for number in range(45)]
LINES = "".join(json.dumps({"text": text, "source": "here"}) + "\n" for text in DOCUMENTS)


def parts_of(found: data.Corpus) -> tuple[list[bytes], list[bytes]]:
    """Documents of training and of validation."""
    parts = (found.train, found.train_starts), (found.valid, found.valid_starts)
    train, valid = ([bytes(each) for each in np.split(text, np.asarray(starts)[1:])] for text, starts in parts)
    return train, valid


def held_out_as_told(train: list[bytes], valid: list[bytes]) -> None:
    assert valid == [DOCUMENTS[number].encode() for number in (1, 21, 41)]
    assert train == [text.encode() for number, text in enumerate(DOCUMENTS) if number % 20 != 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_every_line_of_json_is_a_document(suffix: str, tmp_path: Path) -> None:
    path, pack = tmp_path / f"some{suffix}", {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix[-3:], bytes)
    path.write_bytes(pack((LINES + "\n").encode()))
    found = data.corpus(str(path), tmp_path / "data")
    held_out_as_told(*parts_of(found))
    assert found.about == f"some{suffix} ({len(''.join(DOCUMENTS).encode()):,} bytes, split by document)"
    assert parts_of(data.corpus(str(path), tmp_path / "data")) == parts_of(found)


def test_every_row_of_a_parquet_file_is_a_document(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="files of Parquet need pyarrow")
    from pyarrow import table

    parquet.write_table(table({"text": DOCUMENTS, "number": list(range(45))}), tmp_path / "some.parquet")
    held_out_as_told(*parts_of(data.corpus(str(tmp_path / "some.parquet"), tmp_path / "data")))
    parquet.write_table(table({"number": [1]}), tmp_path / "none.parquet")
    with pytest.raises(SettingsError, match=r"documents in the column text, got .*none.parquet with number"):
        data.corpus(str(tmp_path / "none.parquet"), tmp_path / "data")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(SettingsError, match=r"must be a whole .parquet file, got .*bad.parquet"):
        data.corpus(str(tmp_path / "bad.parquet"), tmp_path / "data")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(LINES)
    data.corpus(str(path), tmp_path / "data")
    path.write_text(LINES[: len(LINES) // 2].rpartition("\n")[0])
    train, valid = parts_of(data.corpus(str(path), tmp_path / "data"))
    assert len(train) + len(valid) < 45


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "must have JSON in every line, got .*line 1"),
        (LINES + "[1]\n", "a text in the field text everywhere, got .*, line 46, without"),
        ('{"text": 3}\n', "a text in the field text everywhere, got .*, line 1, without"),
        ('{"text": "alone"}\n{"text": ""}\n', "at least two documents, got 1 in"),
    ],
)
def test_a_file_without_documents_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(content)
    with pytest.raises(SettingsError, match=said):
        data.corpus(str(tmp_path / "some.jsonl"), tmp_path / "data")
    assert not any((tmp_path / "data").rglob("*.*"))
