"""Triton kernels: held to their twins in a process of their own, compiled without a GPU, absent where not asked for."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_pytorch.kernels import has_triton

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "titans_pytorch"
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed (pip install -e '.[triton]')")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_triton
@pytest.mark.parametrize(
    "which, at_least", [("not slow", 35), pytest.param("slow", 60, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
@pytest.mark.parametrize("where", ["interpreter", pytest.param("cuda", marks=needs_cuda)])
def test_kernels_agree_with_plain_torch(where: str, which: str, at_least: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if where == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/kernel_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert (summary := re.search(r"^(\d+) passed(?!.*skipped)", done.stdout, flags=re.MULTILINE)), done.stdout[-500:]
    assert int(summary[1]) >= at_least


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", ["loop", "loop, states kept", "loop backward"])
def test_at_the_common_size_nothing_is_spilled(name: str) -> None:
    """Dim 32, hidden 128, products in tf32, on an H100."""
    from benchmarks.kernels import CASES, compiled

    found = [case for case in CASES if case.name == name and case.sizes == (32, 128, 16) and not case.is_trial]
    (case,) = [case for case in found if case.precision == "tf32"]
    assert case.constants["num_warps"] == 8
    usage = compiled(case, 90)
    assert usage["spills"] == 0
    assert usage["stack"] == 0
    assert usage["tensor core instructions"] > 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("absent", [{"limit", "of_limit", "shrinks", "stores"}, set()], ids=["free", "limited"])
@pytest.mark.parametrize("dim, hidden", [(32, 128), (64, 128), (64, 96)])
def test_every_way_to_call_the_loop_can_be_compiled(dim: int, hidden: int, absent: set[str]) -> None:
    """One row and one renewal are constants to the compiler; with a limit come masks."""
    from benchmarks.kernels import FOR_MASKS, compiled, loops

    for case in loops(dim, hidden, 5, "tf32"):
        gone = {name for name in absent | (case.absent - FOR_MASKS) if name in case.kernel.arg_names}
        constants = case.constants | dict(count=1, rows=1)
        assert compiled(case._replace(absent=frozenset(gone), constants=constants), 90)["registers"] <= 255


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("dim, tokens", [(128, 16), (64, 32), (64, 16)])
def test_the_largest_that_is_taken_fits_an_a100(dim: int, tokens: int, precision: str) -> None:
    """163 kB of shared memory, whatever the hidden width."""
    from benchmarks.kernels import backward, compiled
    from titans_pytorch.kernels.compilation import fits

    shared = compiled(backward(dim, 64, tokens, precision), 80)["shared"]
    assert (shared <= 163 * 1024) == fits(dim, 64, tokens, precision)


def test_without_triton_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("titans_pytorch.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs the package triton.*pip install 'titans-pytorch\[triton\]'"):
        importlib.import_module("titans_pytorch.kernels.renewals")


def test_triton_is_imported_in_one_file() -> None:
    importing = re.compile(r"^\s*(?:import|from) triton\b", flags=re.MULTILINE)
    found = [
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if importing.search(path.read_text())
    ]
    assert found == ["kernels/language.py"]
