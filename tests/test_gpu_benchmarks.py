"""The run on a GPU keeps to its time, forgets nothing that it measured, and works from end to end, tiny, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.bench import PEER, SCAN, Bench, Item, Record, Unavailable, add_peer
from benchmarks.gpu.budget import Budget, OutOfTime
from benchmarks.gpu.report import ITEMS, report, write
from benchmarks.gpu.results import Results, load
from benchmarks.gpu.suite import outcome
from benchmarks.machine import CHECKOUT

KEY = {"device": "a device", "torch": "1", "commit": "abc", "is_quick": True}
ABOUT = {"machine": {"cpu": "a cpu", "date": "a day", "commit": "abc"}, "settings": {"cuda": None}}


def quick() -> Bench:
    return Bench(torch.device("cpu"), True, {})


def results(folder: Path) -> Results:
    return Results(folder / "gpu.json", KEY, ABOUT)


def item(name: str, seconds: float = 1.0) -> Item:
    return Item("some", name, seconds, lambda bench: {"found": name})


def test_what_is_recorded_is_there_for_the_next_run(tmp_path: Path) -> None:
    assert program.run([item("a"), item("b")], quick(), Budget(1), results(tmp_path)) == []
    again = results(tmp_path)
    assert {key: record["found"] for key, record in again.items.items()} == {"some: a": "a", "some: b": "b"}
    other = Results(tmp_path / "gpu.json", KEY | {"commit": "def"}, ABOUT)
    assert other.items == {}
    other.add("some: a", {})
    assert [run["key"]["commit"] for run in load(tmp_path / "gpu.json")] == ["abc", "def"]


def test_nothing_is_started_that_will_not_end(tmp_path: Path) -> None:
    bench = Bench(torch.device("cpu"), False, {})
    left = program.run([item("long", 100), item("short", 1)], bench, Budget(0.5), results(tmp_path))
    assert left == ["some: long"]
    assert list(results(tmp_path).items) == ["some: short"]


def test_what_does_not_end_is_interrupted(tmp_path: Path) -> None:
    def slow(bench: Bench) -> Record:
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("whoever measures must not keep it")
        return {}

    began = time.monotonic()
    left = program.run([Item("some", "slow", 0.1, slow), item("next")], quick(), Budget(0.01), results(tmp_path))
    assert left[0] == "some: slow"
    assert time.monotonic() - began < 10
    assert "some: slow" not in results(tmp_path).items


def test_the_pace_of_a_device_is_learned() -> None:
    budget = Budget(1)
    assert budget.allows(50)
    with budget.spent_on(0.05):
        time.sleep(0.2)
    assert budget.pace > 3
    assert not budget.allows(50)
    with pytest.raises(OutOfTime), Budget(0).spent_on(1):
        time.sleep(1)


def test_what_goes_wrong_is_a_reason(tmp_path: Path) -> None:
    def missing(bench: Bench) -> Record:
        raise Unavailable("it is not here")

    def broken(bench: Bench) -> Record:
        raise torch.OutOfMemoryError("CUDA out\nof memory")

    items = [Item("some", "missing", 1, missing), Item("some", "broken", 1, broken), item("fine")]
    assert program.run(items, quick(), Budget(1), results(tmp_path)) == []
    found = results(tmp_path).items
    assert [record.get("reason") for record in found.values()] == [
        "it is not here",
        "OutOfMemoryError: CUDA out of memory",
        None,
    ]


def test_a_peer_that_is_not_there_is_a_reason() -> None:
    bench = quick()
    assert add_peer(bench, None) == {}
    assert set(bench.missing) == {PEER, SCAN}
    add_peer(bench, sys.executable)  # which may only have this library
    assert PEER not in bench.sides or SCAN in bench.missing


def test_what_pytest_says_is_understood() -> None:
    said = "F.s\nFAILED tests/test_a.py::test_b[c d] - AssertionError: no\n1 failed, 2 passed, 3 skipped in 1.2s\n"
    assert outcome(said) == {
        "counts": {"failed": 1, "passed": 2, "skipped": 3},
        "failed": ["tests/test_a.py::test_b[c d]"],
    }


def test_tables_have_all_rows_and_empty_cells(tmp_path: Path) -> None:
    empty = report(None)
    assert "Not measured yet." in empty
    assert "| LMM, renewed every 16 tokens, as a CUDA graph |  |  |  |  |" in empty
    found = results(tmp_path)
    model = next(each for each in ITEMS if each.name == "LMM, renewed every 16 tokens")
    found.add(
        model.key,
        dict(seconds=2.0, fastest=1.5, slowest=3.0, peak_bytes=5e9, tokens_per_second=2048.0, parameters=17e7),
    )
    found.add(ITEMS[0].key, {"counts": {"failed": 1, "passed": 7}, "failed": ["tests/test_a.py::test_b"]})
    found.add("decoding: a thing", {"reason": "it cannot be"})
    write(found.path, tmp_path / "gpu.md")
    page = (tmp_path / "gpu.md").read_text()
    assert "| LMM, renewed every 16 tokens | 170 M | 2 (1.5–3) | 2,048 | 5,000 |" in page
    assert "`pytest -m cuda`: 1 failed, 7 passed (`tests/test_a.py::test_b`)." in page
    assert "- decoding: a thing: it cannot be" in page


def test_without_cuda_it_says_so_in_a_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().startswith("this needs a CUDA device, and there is none")
    assert "\n" not in done.stderr.strip()


@pytest.mark.slow
def test_everything_on_a_cpu(tmp_path: Path) -> None:
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "4"]
    command += ["--out", str(out), "--page", str(page)]
    before = subprocess.run(["git", "status", "--porcelain"], cwd=CHECKOUT, capture_output=True, text=True).stdout
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{len(ITEMS)} of {len(ITEMS)} measured" in done.stdout
    assert "s left" not in done.stdout
    (run,) = json.loads(out.read_text())["runs"]
    assert set(run["items"]) == {each.key for each in ITEMS}
    wrong = {
        key: each["reason"]
        for key, each in run["items"].items()
        if "needs a CUDA device" not in each.get("reason", "needs a CUDA device")
    }
    assert wrong == {}
    assert run["items"]["tests: pytest -m cuda"]["status"] == 0
    for secret in (str(tmp_path), str(CHECKOUT)):
        assert secret not in out.read_text() + page.read_text()
    after = subprocess.run(["git", "status", "--porcelain"], cwd=CHECKOUT, capture_output=True, text=True).stdout
    assert after == before
