"""lm-eval with models of the library: the scores are the library's own, and nothing is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")
pytest.importorskip("lm_eval", reason="titans_pytorch.hf.evaluation needs lm-eval, the extra eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from titans_pytorch import TitansConfig, TitansMAG
from titans_pytorch.hf import byte_tokenizer, from_library
from titans_pytorch.hf.evaluation import TitansLM
from titans_pytorch.tasks import NO_ANSWER, make_task
from titans_pytorch.tasks.harness_files import write_tasks

pytestmark = pytest.mark.filterwarnings("default")  # what lm-eval warns about is not ours to fix
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."


@pytest.fixture(scope="module")
def library() -> TitansMAG:
    torch.manual_seed(0)
    return TitansMAG(259, TitansConfig(dim=16, depth=2, heads=2, window=8, memory_chunk=4, memory_refresh=8)).eval()


def harness(library: TitansMAG, **options: Any) -> TitansLM:
    model = from_library(library, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return TitansLM(model, tokenizer=byte_tokenizer(), device="cpu", **options)


def rolling(document: str) -> Instance:
    return Instance("loglikelihood_rolling", doc={}, arguments=(document,), idx=0)


def test_a_document_has_the_loss_of_the_library_whatever_the_pieces(library: TitansMAG) -> None:
    for piece in (4096, 7, 1):
        harness_of = harness(library, piece=piece)
        ids = torch.tensor([[harness_of.prefix_token_id, *byte_tokenizer()(TEXT)["input_ids"]]])
        expected = -float(library.loss(ids).detach()) * (ids.shape[1] - 1)
        assert harness_of.loglikelihood_rolling([rolling(TEXT)])[0] == pytest.approx(expected, rel=1e-5)


def test_windows_forget(library: TitansMAG) -> None:
    whole = harness(library).loglikelihood_rolling([rolling(TEXT)])[0]
    assert harness(library, rolling="windows", max_length=100).loglikelihood_rolling([rolling(TEXT)])[0] == (
        pytest.approx(whole, rel=1e-5)
    )
    windowed = harness(library, rolling="windows", max_length=16).loglikelihood_rolling([rolling(TEXT)])[0]
    assert abs(windowed - whole) > 1e-3


def test_nothing_is_cut_off_in_silence(library: TitansMAG) -> None:
    short = harness(library, max_length=20)
    with pytest.raises(ValueError, match="max_length must be at least the 67 tokens"):
        short.loglikelihood([Instance("loglikelihood", {}, (TEXT, " Yes."), 0)])
    until = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    with pytest.raises(ValueError, match="max_length must be at least the 67 tokens"):
        short.generate_until([Instance("generate_until", {}, (TEXT, until), 0)])
    assert harness(library).generate_until([Instance("generate_until", {}, (TEXT, until), 0)])


def test_what_does_not_go_together_is_refused(library: TitansMAG) -> None:
    with pytest.raises(ValueError, match="rolling must be one of 'stream', 'windows', got 'slide'"):
        harness(library, rolling="slide")
    with pytest.raises(ValueError, match="needs max_length, the length of a window"):
        harness(library, rolling="windows")
    with pytest.raises(ValueError, match="batch_size='auto' needs max_length"):
        harness(library, batch_size="auto")


TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{a}}'\n"
    "metric_list: [{metric: acc}]\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{c[0]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 5, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
}


def commanded(library: TitansMAG, folder: Path) -> dict[str, Any]:
    """The results of the command, with a model and its tokenizer from a folder."""
    from_library(library, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    command = [sys.executable, "-m", "titans_pytorch.hf.evaluation", "run", "--model", "titans", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder / 'model'}", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(folder), "--output_path", str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = folder.glob("results/**/results_*.json")
    found: dict[str, Any] = json.loads(file.read_text())["results"]
    return found


@pytest.mark.slow
def test_tasks_run_on_files_of_ones_own(library: TitansMAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "data.jsonl"
    docs = [{"q": f"{n} and {n} is", "c": [f" {2 * n}", f" {3 * n}"], "a": 0} for n in range(1, 6)]
    data.write_text("\n".join(map(json.dumps, docs)))
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = [
        lm_eval.simple_evaluate(harness(library, batch_size=size), tasks=list(TASKS), task_manager=manager)["results"]
        for size in (1, 3)
    ]
    for result in results:
        assert 0 <= result["choice"]["acc,none"] <= 1
        assert result["answer"]["exact_match,none"] >= 0
    by_command = commanded(library, tmp_path)
    assert by_command["whole"]["bits_per_byte,none"] == pytest.approx(
        results[0]["whole"]["bits_per_byte,none"], rel=1e-6
    )
    bits = [result["whole"]["bits_per_byte,none"] for result in results]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    texts = [byte_tokenizer()(doc["q"])["input_ids"] for doc in docs]
    with torch.no_grad():
        prefix = harness(library).prefix_token_id
        nats = sum(float(library.loss(torch.tensor([[prefix, *ids]]))) * len(ids) for ids in texts)
    assert bits[0] == pytest.approx(nats / 0.6931471805599453 / sum(map(len, texts)), rel=1e-5)


@pytest.mark.slow
def test_tasks_of_the_library_are_asked_as_it_asks_them(
    library: TitansMAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    names = write_tasks(tmp_path, ["niah_single_1", "babilong_qa1"], [500], rows=3, seed=4)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(harness(library), tasks=names, task_manager=manager)["results"]
    for name in names:
        questions = make_task(name.removesuffix("_500"), tokens=500).draw(3, torch.Generator().manual_seed(4))
        with torch.no_grad():
            logits, _ = library(questions.ids + 3)  # ids of bytes begin after three special ones
        costs = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2),
            torch.where(questions.is_asked, questions.answers + 3, NO_ANSWER),
            reduction="none",
        )
        perplexity = float(costs.sum(dim=1).mean().exp())
        assert found[name]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
        guesses = logits.argmax(dim=-1) - 3
        assert found[name]["acc,none"] == make_task(name.removesuffix("_500")).score(guesses, questions)


def test_blanks_at_the_end_of_a_prompt_are_no_part_of_the_answer(library: TitansMAG) -> None:
    prompt, answer = harness(library)._encode_pair("It is ", "42")
    assert (prompt, answer) == (byte_tokenizer()("It is ")["input_ids"], byte_tokenizer()("42")["input_ids"])
