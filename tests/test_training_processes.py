"""Two processes train as one does that accumulates, sharded or not, and continue each other's runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.training_runs import SMALL, logged, text, train, weights

CHECKOUT = Path(__file__).parent.parent
STEPS = ["--steps", "4", "--validate-every", "2", "--checkpoint-every", "2", "--lr-end", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLOSE = dict(rtol=1e-5, atol=1e-5)
SHARDING = pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """One process that accumulates: four steps, then two more."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert train(folder, data, *STEPS, "--accumulate", "2") == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Two processes: four steps (`ddp`, `fsdp2`), and two steps after two of one process (`ddp-after`, ...)."""
    root = tmp_path_factory.mktemp("two")
    for name, options in (("ddp", []), ("fsdp2", ["--shard"])):
        launch(TORCHRUN, root / name, data, *STEPS, *options)
        begun = root / f"{name}-after"
        assert train(begun, data, *STEPS, "--steps", "2", "--accumulate", "2") == 0
        launch(TORCHRUN, begun, data, "--resume", "--steps", "4", "--accumulate", "1", *options)
    return {name: root / name for name in ("ddp", "fsdp2", "ddp-after", "fsdp2-after")}


def launch(launcher: list[str], folder: Path, data: Path, *options: str) -> None:
    where = ["--folder", str(folder), "--data", str(data), "--data-dir", str(data.parent / "data")]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, "train_mac.py", *SMALL, *where, *options],
        **dict(cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120),
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> list[list[float]]:
    numbers = ("loss", "lr", "valid_bits_per_byte")
    return [[each[name] for name in numbers if name in each] for each in logged(folder)]


@SHARDING
def test_two_processes_are_one_that_accumulates(sharding: str, one: Path, two: dict[str, Path]) -> None:
    assert len(losses(one)) == 6
    assert_close(losses(two[sharding]), losses(one), **CLOSE)
    assert_close(weights(two[sharding]), weights(one), rtol=1e-3, atol=1e-4)


@SHARDING
def test_two_processes_go_on_with_what_one_has_saved(sharding: str, one: Path, two: dict[str, Path]) -> None:
    assert_close(losses(two[f"{sharding}-after"])[-3:], losses(one)[-3:], **CLOSE)


@SHARDING
def test_one_process_goes_on_with_what_two_have_saved(
    sharding: str, one: Path, two: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    ours, theirs = (Path(shutil.copytree(run, tmp_path / run.name)) for run in (one, two[sharding]))
    for run in (ours, theirs):
        assert train(run, data, "--resume", "--steps", "6", "--accumulate", "2", "--no-shard") == 0
    assert_close(losses(theirs), losses(ours), **CLOSE)
    assert len(losses(theirs)) == 9


def test_two_processes_see_different_text(two: dict[str, Path], tmp_path: Path, data: Path) -> None:
    """Otherwise they would agree with one process that accumulates nothing."""
    assert train(tmp_path / "run", data, *STEPS) == 0
    assert abs(losses(tmp_path / "run")[0][0] - losses(two["ddp"])[0][0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]])
def test_accelerate_launch(options: list[str], one: Path, tmp_path: Path, data: Path) -> None:
    """With the options for GPUs, whose launcher starts processes on CPU just as well."""
    common = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *common, *options]
    launch(command, tmp_path / "run", data, *STEPS)
    assert_close(losses(tmp_path / "run"), losses(one), **CLOSE)
