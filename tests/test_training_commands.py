"""Wrong settings end in one sentence; scripts, pictures and the command line do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_implicit_mlp_attn
import train_mac
import train_titans
from tests.training_runs import error, logged, text, train, train_attention
from titans_pytorch import MemoryAsContextTransformer, NeuralMemory
from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.training import checkpoints, runs_command
from titans_pytorch.training.decoding import continued
from titans_pytorch.training.models import MACModel, PaperModel, size
from titans_pytorch.training.plan import merged
from titans_pytorch.training.runs import Run
from titans_pytorch.training.settings import Training
from titans_pytorch.training.surprise import text_surprise

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(folder, data) == 0
    return folder


# ---- wrong settings


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dimm", "3"], "unknown option --dimm; did you mean --dim?"),
        (["--sequence", "0"], "--sequence must be at least 2, got 0"),
        (["--steps", "many"], "--steps: must be a whole number, got 'many'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be above 0, got -1.0"),
        (["--lr", "nan"], "--lr must be a number, got nan"),
        (["--optimizer", "sgd"], "--optimizer: invalid choice: 'sgd'"),
        (["--preset", "tpu"], "--preset: invalid choice: 'tpu'"),
        (["--trackers", "paper"], "--trackers must be among"),
        (["--data", "/nowhere/text.txt"], "--data must be enwik8, python or a file, got nothing at"),
        (["--data", "/"], "--data must be enwik8, python or a file, got a folder at"),
        (["--sequence", "1000"], "--data must have more than --sequence 1000 bytes of validation text, got 1000"),
        (["--dim", "0"], "the model cannot be built: dim must be"),
        (["--memory-layers", "7"], "the model cannot be built: neural_memory_layers must hold numbers from 1"),
        (["--memory-layers", "none"], "--memory-layers must name at least one layer"),
        (["--memory-batch", "33"], "the model cannot be built: batch_size must be"),
        (["--shard"], "--shard needs at least 2 processes"),
    ],
)
def test_wrong_settings_are_one_sentence(
    options: list[str], message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", data, *options) == 2
    assert message in error(capsys)


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    assert train(tmp_path / "run", tmp_path / "empty.txt") == 2
    assert "which is empty" in error(capsys)


def test_resuming_something_else(run: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--resume", "--dim", "64"], "--resume must keep the architecture of the run, got --dim 64 instead of 32"),
        (["--resume", "--optimizer", "muon"], "--optimizer must be adamw, as the run was started, got muon"),
        ([], "--folder must be a new folder"),
    ):
        assert train(run, data, *options) == 2
        assert message in error(capsys)
    assert train(tmp_path / "nothing", data, "--resume") == 2
    assert "must be the folder of a run" in error(capsys)
    assert train_attention(run, data, "--resume") == 2
    assert "must be a run of this script (implicit-mlp-attn)" in error(capsys)


def test_edited_settings_are_noticed(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train(folder, data, "--steps", "2") == 0
    config = Run(folder).config()
    for changed, message in (
        (config | {"model": config["model"] | {"dim": "wide"}}, "--dim must be a whole number, got 'wide'"),
        (config | {"training": {"speed": 3}}, "must hold settings of Training, got ['speed']"),
        ([], "must be the settings of a run, got something else"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert train(folder, data, "--resume") == 2
        assert message in error(capsys)


def test_a_training_that_breaks_down_says_so(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", data, "--lr", "1e30", "--clip", "1e30", "--warmup", "0", "--steps", "40") == 2
    assert "training broke down at step" in error(capsys)


# ---- scripts


@pytest.mark.parametrize("script", ["train_mac.py", "train_titans.py", "train_implicit_mlp_attn.py"])
def test_scripts_run_from_anywhere_without_a_network(script: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HTTPS_PROXY": "http://127.0.0.1:9", "MPLCONFIGDIR": "m"}
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / script), "--preset", "debug", "--device", "cpu"],
        **dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "data: Python's own source text" in done.stdout
    assert "sample:" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    has_memory = script != "train_implicit_mlp_attn.py"
    pictures = ("curves.png", "surprise.png", *(["saved.png"] if has_memory else []))
    for name in pictures:
        assert f"picture: runs/{folder.name}/{name}" in done.stdout
        assert (folder / name).stat().st_size > 10_000
    *_, sentence = done.stdout.splitlines()[: -len(pictures)]
    assert sentence.startswith("held-out text: ") == has_memory
    records = [each["valid_bits_per_byte"] for each in logged(folder) if "valid_bits_per_byte" in each]
    assert records[-1] < records[0] < 8.5


def test_help_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "train_mac.py", "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    for option in ("--preset", "--memory-chunk", "--no-sliding", "--accumulate", "--resume", "--trackers"):
        assert option in done.stdout


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, titans_pytorch; print(*{'accelerate', 'matplotlib', 'titans_pytorch.training'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_learning(tmp_path: Path, data: Path) -> None:
    """Words that repeat are learned, and the learning rate ends low."""
    assert train(tmp_path / "run", data, "--steps", "60", "--lr", "1e-2", "--validate-every", "20") == 0
    bits = [each["valid_bits_per_byte"] for each in logged(tmp_path / "run") if "valid_bits_per_byte" in each]
    assert bits[-1] < bits[0] < 3.5  # 8 where nothing is learned
    rates = [each["lr"] for each in logged(tmp_path / "run") if "lr" in each]
    assert rates[0] < max(rates) == pytest.approx(1e-2, rel=0.05)
    assert rates[-1] == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--optimizer", "muon"], ["--trackers", "tensorboard"]])
def test_options_of_the_loop(
    options: list[str], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tensorboard" in options:
        pytest.importorskip("tensorboard")
    assert train(tmp_path / "run", data, *options, "--steps", "4") == 0
    assert logged(tmp_path / "run")[3]["loss"] < 6


@pytest.mark.slow
def test_compiled(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the code generator, which takes minutes, and without memory, whose compilation test_ecosystem tests."""
    used, original = [], nn.Module.compile

    def compiled(self: nn.Module, **options: Any) -> None:
        used.append(1)
        original(self, **options, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compiled)
    options = ("--steps", "3", "--memory", "off")
    assert train(tmp_path / "compiled", data, "--compile", *options) == 0
    assert used
    assert train(tmp_path / "plain", data, *options) == 0
    losses = [[each["loss"] for each in logged(tmp_path / name) if "loss" in each] for name in ("compiled", "plain")]
    assert_close(*losses, rtol=1e-4, atol=1e-4)


def test_training_for_a_time(tmp_path: Path, data: Path) -> None:
    assert train(tmp_path / "run", data, "--minutes", "0.02", "--validate-every", "0") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["seconds"] > 1.2 > records[-3]["seconds"]


@pytest.mark.parametrize("preset", ["debug", "cpu", "gpu"])
def test_without_memory_as_many_parameters(preset: str) -> None:
    settings = merged(MACModel(), train_mac.PRESETS[preset])
    with_memory, without = settings.build(), replace(settings, memory=False).build()
    assert abs(size(without) / size(with_memory) - 1) < 0.02
    counts = [sum(isinstance(each, NeuralMemory) for each in model.modules()) for model in (with_memory, without)]
    assert counts == [len(settings.memory_layers), 0]


def test_the_gpu_preset_is_the_published_configuration() -> None:
    preset = train_mac.PRESETS["gpu"]
    settings = merged(MACModel(), preset)
    arguments = settings.arguments(settings.memory_layers, 256)
    memory = settings.memory_arguments()["neural_memory_kwargs"]
    assert (arguments["dim"], arguments["depth"], arguments["segment_len"]) == (384, 8, 32)
    assert (arguments["neural_memory_layers"], memory["heads"], memory["dim_head"]) == ((2, 4, 6), 4, 64)
    assert (arguments["neural_memory_segment_len"], arguments["neural_memory_batch_size"]) == (4, 128)
    assert (arguments["num_persist_mem_tokens"], arguments["num_longterm_mem_tokens"]) == (4, 4)
    assert memory["spectral_norm_surprises"]
    assert memory["attn_pool_chunks"]
    assert (preset["sequence"], preset["batch"], preset["accumulate"], preset["lr"]) == (512, 4, 4, 2e-4)


# ---- trained runs


def test_checkpoints_are_models(run: Path) -> None:
    path = checkpoints.paths(run / "checkpoints")[0]
    model = MemoryAsContextTransformer.from_pretrained(path)
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)


def test_samples_come_from_the_exact_cache(run: Path) -> None:
    model, _ = Run(run).model()
    prompt = b"memory learns at test time. " * 3
    ids = torch.tensor([list(prompt)])
    expected = model.sample(ids, len(prompt) + 40, temperature=0.0, use_cache=False, show_progress=False)[0]
    assert list(continued(model, np.frombuffer(prompt, dtype=np.uint8), 40, temperature=0.0)) == expected.tolist()


@pytest.mark.parametrize("attention", ["implicit-mlp", "nested", "full"])
def test_the_attention_transformer_decodes_with_its_cache(attention: str) -> None:
    torch.manual_seed(0)
    settings = dict(dim=16, depth=2, heads=2, dim_head=8, mlp_hiddens=(8, 12, 8))
    model = AttentionTransformer(num_tokens=256, attention=attention, **settings)  # type: ignore[arg-type]
    ids = torch.randint(0, 256, (2, 11))
    whole, (first, cache) = model(ids), model(ids[:, :4], return_cache=True)
    second, _ = model(ids[:, 4:], cache=cache, return_cache=True)
    assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    assert_close(model(changed)[:, :7], whole[:, :7])
    assert_close(
        model(ids, return_loss=True),
        torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )


def test_sample_streams_what_was_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"memory " * 500)
    for options in (["--prompt", "memory "], ["--prompt-file", str(tmp_path / "prompt.txt")]):
        outputs = []
        for _ in range(2):
            assert runs_command.main(["sample", str(run), "--length", "20", "--seed", "3", *options]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
        assert len(outputs[0]) > 5


def test_plot_draws_all_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("curves.png", "surprise.png", "saved.png")
    assert runs_command.main(["plot", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"picture: {run / name}" for name in names]
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs a command"),
        (["sample", "RUN"], "needs either --prompt or --prompt-file, got none"),
        (["sample", "RUN", "--prompt", ""], "must have at least one byte"),
        (["sample", "RUN", "--prompt-file", "/nowhere"], "/nowhere cannot be read"),
        (["sample", "RUN", "--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0"),
        (["sample", "RUN", "--prompt", "a", "--device", "abacus"], "--device must be one that torch has here"),
        (["sample", "/nowhere", "--prompt", "a"], "must be the folder of a run"),
        (["plot", "/nowhere"], "must be the folder of a run"),
    ],
)
def test_wrong_commands_are_one_sentence(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs_command.main([str(run) if each == "RUN" else each for each in arguments]) == 2
    assert message in error(capsys)


def test_a_run_cannot_name_code_to_load(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = Run(folder).config()
    (folder / "config.json").write_text(json.dumps(config | {"model_class": "subprocess.Popen"}))
    assert runs_command.main(["sample", str(folder), "--prompt", "a"]) == 2
    assert "must name a model of titans_pytorch" in error(capsys)


def test_surprise_is_of_the_bytes_themselves() -> None:
    """Bits are those of the loss; a memory's surprise sits where the surprising byte is, inserted tokens aside."""
    torch.manual_seed(0)
    settings = replace(merged(MACModel(), train_mac.PRESETS["debug"]), longterm_tokens=3, window=8)
    model = settings.build()
    content = bytes(range(64))
    found = text_surprise(model, np.frombuffer(content, dtype=np.uint8))
    ids = torch.tensor([list(content)])
    assert float(found.bits[1:].mean()) == pytest.approx(model(ids, return_loss=True).item() * 1.442695, rel=1e-4)
    assert found.bits[0].isnan()
    assert found.memory is not None
    assert found.memory.shape == (64,)
    assert found.memory[:60].isfinite().all()
    changed = text_surprise(model, np.frombuffer(content[:40] + b"\xff" + content[41:], dtype=np.uint8))
    assert changed.memory is not None
    # Both are over their own mean, so that shares of the first byte's are compared.
    shares = changed.memory / changed.memory[0] - found.memory / found.memory[0]
    different = (shares.abs() > 1e-4).nonzero().flatten()
    assert int(different[0]) == 40


def test_the_paper_models_train_on_a_cpu_as_memory_was_found_to_pay() -> None:
    """The preset is the model of docs/results.md, and its text and lengths: what is cut is the number of steps."""
    shown = json.loads((CHECKOUT / "benchmarks/learning/comparisons/text.json").read_text())
    preset = train_titans.PRESETS["cpu"]
    model, training = merged(PaperModel(), preset), merged(Training(), preset)
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in shown["model"].items()}
    assert all(getattr(model, name) == value for name, value in wanted.items() if name != "kind")
    assert all(getattr(training, name) == value for name, value in shown["train"].items())
    assert (training.sequence, training.data) == (shown["task"]["tokens"], "python")


def test_presets_are_settings() -> None:
    for presets in (train_mac.PRESETS, train_titans.PRESETS, train_implicit_mlp_attn.PRESETS):
        assert set(presets) == {"debug", "cpu", "gpu"}
