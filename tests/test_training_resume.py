"""A run that was killed and resumed is the run that was not: bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests import killed
from tests.training_runs import error, logged, text, train, train_attention, weights
from titans_pytorch.training import checkpoints

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, data, *killed.OPTIONS) == 0
    return folder


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Runs that were killed, by moment."""
    root = tmp_path_factory.mktemp("dead")
    command = [sys.executable, "-m", "tests.killed", str(root), str(data)]
    subprocess.run(command, check=True, capture_output=True, cwd=CHECKOUT, timeout=240)
    return root


def check_equal(folder: Path, whole: Path) -> None:
    assert logged(folder) == logged(whole)
    assert (folder / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    assert_close(weights(folder), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("moment", [moment.__name__ for moment in killed.MOMENTS])
def test_killed_and_resumed_is_the_uninterrupted_run(moment: str, dead: Path, whole: Path, data: Path) -> None:
    folder = dead / moment
    assert len(logged_before(folder)) < len(logged(whole))
    assert train(folder, data, "--resume") == 0
    check_equal(folder, whole)
    left = [path.name for path in (folder / "checkpoints").iterdir() if not checkpoints.NAME.fullmatch(path.name)]
    assert left == []


def logged_before(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []


def test_killed_from_outside_at_whatever_moment(tmp_path: Path, data: Path) -> None:
    """As `kill -9` does it: no moment is chosen."""
    options = [
        "--preset",
        "debug",
        "--steps",
        "60",
        "--checkpoint-every",
        "2",
        "--sample-length",
        "8",
        "--device",
        "cpu",
    ]
    where = ["--data", str(data), "--folder", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "train_mac.py"), *options, *where],
        **dict(cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment),
    )
    while len(logged_before(tmp_path / "run")) < 12 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train(tmp_path / "run", data, "--resume") == 0
    assert train(tmp_path / "again", data, *options[2:]) == 0
    check_equal(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_going_on_with_more_steps_and_either_optimizer(optimizer: str, tmp_path: Path, data: Path) -> None:
    """The learning rate is the one that the longer training has: only its first part is compared where it is flat."""
    common = ["--optimizer", optimizer, "--lr-end", "1"]
    assert train(tmp_path / "short", data, *common, "--steps", "5") == 0
    assert train(tmp_path / "short", data, "--resume", "--steps", "8") == 0
    assert train(tmp_path / "long", data, *common, "--steps", "8") == 0
    assert_close(weights(tmp_path / "short"), weights(tmp_path / "long"), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["implicit-mlp", "nested", "full"])
def test_the_other_script_too(kind: str, tmp_path: Path, data: Path) -> None:
    assert train_attention(tmp_path / "run", data, "--attention", kind, "--steps", "4", "--lr-end", "1") == 0
    assert train_attention(tmp_path / "run", data, "--resume", "--steps", "6") == 0
    assert train_attention(tmp_path / "whole", data, "--attention", kind, "--steps", "6", "--lr-end", "1") == 0
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


# ---- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, halve, Path.unlink])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(
    name: str, harm: object, whole: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints"))
    last, before = checkpoints.paths(copy)[:2]
    harm(last / name)  # type: ignore[operator]
    with pytest.warns(UserWarning, match="is damaged .*: the one before is used"):
        found = checkpoints.last(copy)
    assert found is not None
    assert found.path == before


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    halve(checkpoints.paths(folder / "checkpoints")[0] / "model.safetensors")
    assert train(folder, data, "--resume") == 0
    assert "warning: the checkpoint" in capsys.readouterr().err
    check_equal(folder, whole)


def test_where_all_are_damaged_that_is_said(
    whole: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in checkpoints.paths(folder / "checkpoints"):
        halve(path / "model.safetensors")
    assert train(folder, data, "--resume") == 2
    assert "are damaged" in error(capsys)


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_nothing_is_ever_unpickled(
    name: str, whole: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "was-run"
    path = checkpoints.paths(folder / "checkpoints")[0]
    torch.save(Malicious(mark), path / name)
    (path / "manifest.json").write_text(json.dumps(checkpoints.described(path)))
    assert train(folder, data, "--resume", "--steps", "12") == 2
    assert "must hold safetensors" in error(capsys)
    assert not mark.exists()


# ---- what is kept


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, save_directory: Path) -> None:
            for name in ("config.json", "model.safetensors"):
                (save_directory / name).write_text("")

    scores = [3.0, 1.0, 2.0, None, 4.0]
    for step, bits in enumerate(scores, 1):
        checkpoints.save(tmp_path, Model(), {}, checkpoints.Progress(step=step, bits=bits), keep=2)
    assert [path.name[-1] for path in checkpoints.paths(tmp_path)] == ["5", "4", "2"]
    best = checkpoints.best(tmp_path)
    assert best is not None
    assert best.progress.step == 2


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", killed.on_call(2, checkpoints.save_file, full))
    assert train(tmp_path / "run", data) == 2
    assert "no space left on the disk" in error(capsys)
    left = checkpoints.paths(tmp_path / "run" / "checkpoints")
    assert [path.name for path in left] == ["step-00000005"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == left
    assert checkpoints.damage(left[0]) is None
    monkeypatch.undo()
    assert train(tmp_path / "run", data, "--resume") == 0
    assert train(tmp_path / "whole", data) == 0
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_a_run_is_trained_by_one_process_at_a_time(
    tmp_path: Path, whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from titans_pytorch.training.runs import Run

    with Run(whole).locked():
        assert train(whole, data, "--resume") == 2
    assert "is being trained by another process" in error(capsys)


def test_stopping_saves_and_resuming_goes_on(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from titans_pytorch.training import loop

    def interrupted(self: loop.Trainer, *args: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", killed.on_call(5, step, interrupted))
    assert train(tmp_path / "run", data, *killed.OPTIONS) == 130
    assert checkpoints.paths(tmp_path / "run" / "checkpoints")[0].name == "step-00000005"
    assert train(tmp_path / "run", data, "--resume") == 0
    assert [each for each in logged(tmp_path / "run") if "loss" in each] == [e for e in logged(whole) if "loss" in e]
