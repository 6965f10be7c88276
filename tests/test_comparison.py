"""The protocol holds what it says: equal parameters, equal batches, frozen is frozen, nothing missing is filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from benchmarks import records
from benchmarks.learning import compare as program
from benchmarks.learning import compare_report
from benchmarks.learning.asking import Tally, distances, ranges
from benchmarks.learning.protocol import (
    ceiling_of,
    comparison_from,
    floor_of,
    matched_width,
    parameters,
    recovery,
)
from titans_pytorch import NeuralMemory
from titans_pytorch.tasks.text import NEVER, NO_NAME
from titans_pytorch.training.last_token import LastTokenReader
from titans_pytorch.training.models import MACModel, PaperModel, size

SMALL = dict(kind="titans", variant="mag", dim=16, depth=2, heads=2, window=8, memory_chunk=4, memory_refresh=8)
TRAIN = dict(batch=2, lr=1e-3, warmup=2, clip=1.0)
COMPARISONS = sorted((Path(program.__file__).parent / "comparisons").glob("*.json"))


def config(**more: Any) -> dict[str, Any]:
    task = dict(name="mqar", pairs=3, keys=8, tokens=40, gap=8)
    asking = dict(lengths=[1, 2], rows=8, batch=4)
    return dict(name="small", task=task, model=SMALL, train=TRAIN, seeds=[0], within=0.02, evaluation=asking) | more


def written(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config(**more)))
    return path


def compared(folder: Path, *options: str, **more: Any) -> list[dict[str, Any]]:
    out = folder / "results.jsonl"
    assert program.main([str(written(folder, **more)), "--out", str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


# ---- equal parameters


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
@pytest.mark.parametrize("layers", [None, (2,)])
def test_floor_and_ceiling_have_as_many_parameters(variant: Any, layers: tuple[int, ...] | None) -> None:
    settings = PaperModel(dim=128, depth=4, heads=4, window=32, variant=variant, memory_layers=layers)
    wanted = parameters(settings, 256)
    for bare in (floor_of(settings, 256), ceiling_of(settings, 4096, 256)):
        model = bare.build(256)
        assert abs(size(model) / wanted - 1) <= 0.001
        assert not any(isinstance(module, NeuralMemory) for module in model.modules())
    assert ceiling_of(settings, 4096, 256).window == 4096
    assert floor_of(settings, 256).window == 32


def test_the_published_transformer_has_a_floor_too() -> None:
    settings = MACModel(dim=64, depth=2, heads=2, dim_head=32, memory_layers=(1,), memory_dim_head=32, memory_heads=2)
    floor = floor_of(settings, 256)
    assert abs(parameters(floor, 256) / parameters(settings, 256) - 1) <= 0.001


def test_a_ceiling_sees_everything() -> None:
    settings = PaperModel(dim=16, depth=1, heads=2, window=4, variant="mac", memory_chunk=4, memory_refresh=8)
    model = ceiling_of(settings, 64, 16, within=0.05).build(16).double()
    ids = torch.randint(0, 16, (1, 60))
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 16
    assert (model(ids)[0][0, -1] - model(changed)[0][0, -1]).abs().max() > 1e-9


def test_a_model_that_cannot_be_matched_is_refused() -> None:
    settings = PaperModel(dim=16, depth=2, heads=2, window=8, variant="mag")
    with pytest.raises(ValueError, match=r"must come within 0.001% of [\d,]+ parameters, got [\d,]+ at best"):
        floor_of(settings, 256, within=1e-5)
    assert matched_width(lambda width: 100 + 7 * width, 100 + 7 * 33) == 33


def test_recovery_is_the_share_of_what_the_ceiling_wins() -> None:
    assert recovery(0.75, 0.5, 1.0) == 0.5
    assert recovery(-2.0, -2.2, -1.8) == pytest.approx(0.5)
    assert recovery(0.5, 0.5, 0.5) is None
    assert recovery(0.5, float("nan"), 1.0) is None


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_comparisons_that_come_with_it_can_be_made(path: Path) -> None:
    comparison = program.loaded(path)
    sizes = {entry.name: parameters(entry.settings, comparison.make_task().num_tokens) for entry in comparison.entries}
    assert max(sizes.values()) / min(sizes.values()) - 1 <= 2 * comparison.within
    model = comparison.entries[0].build(comparison.make_task())
    assert any(isinstance(module, NeuralMemory) for module in model.modules())
    assert len(comparison.seeds) >= 3


# ---- runs


def test_all_are_trained_alike_and_every_number_says_where_it_comes_from(tmp_path: Path) -> None:
    found = {each["model"]: each for each in compared(tmp_path, budgets=[{"steps": 4}])}
    assert list(found) == ["memory", "memory, frozen", "floor", "ceiling"]
    for record in found.values():
        assert record["steps"] == 4
        assert set(record["results"]) == {"40", "80"}
        assert record["results"]["40"]["answers"] == 8 * 3
        assert record["machine"]["commit"]
        assert record["machine"]["threads"] == torch.get_num_threads()
        assert record["settings"]["train"] == TRAIN
        assert str(tmp_path) not in json.dumps(record)
    assert found["memory"]["writes_off"] is not None
    assert found["floor"]["writes_off"] is None
    before = (tmp_path / "results.jsonl").read_text()
    compared(tmp_path, budgets=[{"steps": 4}])
    assert (tmp_path / "results.jsonl").read_text() == before


def test_a_cost_of_storing_bears_on_memories_alone(tmp_path: Path) -> None:
    only = dict(budgets=[{"steps": 4}], roles=["memory", "floor"])
    free = {each["model"]: each for each in compared(tmp_path, **only)}
    *_, dear = compared(tmp_path, **only, train=TRAIN | dict(step_cost=10.0))
    assert program.main(["report", str(tmp_path / "results.jsonl")]) == 2, "two models are called memory"
    records.add(tmp_path / "own.jsonl", free["floor"])
    records.add(tmp_path / "own.jsonl", dear)
    assert program.main(["report", str(tmp_path / "own.jsonl")]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3, "the floor is there already"
    assert dear["settings"]["train"] == TRAIN | dict(step_cost=10.0)
    assert dear["losses"][0] == free["memory"]["losses"][0]
    assert dear["losses"][-1] > free["memory"]["losses"][-1]


def test_other_versions_of_the_task_are_asked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"3 pairs": {}, "7 pairs": dict(pairs=7, tokens=80), "overwritten": dict(overwritten=2, rows=5)}
    asking = dict(lengths=[1], rows=16, batch=4, versions=more)
    memory, floor = compared(tmp_path, "--only", "memory,floor", budgets=[{"steps": 2}], evaluation=asking)
    for record in (memory, floor):
        found = record["versions"]
        assert {name: each["answers"] for name, each in found.items()} == {
            "3 pairs": 16 * 3,
            "7 pairs": 8 * 7,
            "overwritten": 5 * 3,
        }
        assert found["3 pairs"]["score"] == record["results"]["40"]["score"], "the same sequences"
    assert set(memory["versions_writes_off"]) == set(more)
    assert compare_report.main([str(tmp_path / "results.jsonl"), "--to", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| asked, not trained on | 3 pairs | 7 pairs | overwritten |" in page
    assert "| sequences a seed | 16 | 8 | 5 |" in page
    assert f"| floor | {floor['versions']['3 pairs']['score']:.3f} |" in page
    other = config(evaluation=asking | dict(versions=dict(wide=dict(keys=9))))
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert program.main([str(tmp_path / "config.json"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "evaluation.versions must have the task's 17 ids, got 19 in wide" in capsys.readouterr().err


def test_frozen_never_writes_and_starts_like_the_model_with_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = comparison_from(config(), "")
    writes, frozen = comparison.entries[:2]
    trained = [
        program.Training(comparison, entry, 0, {"steps": 3}, tmp_path / entry.name) for entry in (writes, frozen)
    ]
    assert_close(trained[0].model.state_dict(), trained[1].model.state_dict(), rtol=0, atol=0)
    start = {name: value.clone() for name, value in trained[1].model.state_dict().items()}
    with frozen.running(trained[1].model):
        trained[1].train("")
    after = trained[1].model.state_dict()
    assert_close(
        after["backbone.blocks.0.mixer.memory.to_adaptive_step.0.weight"],
        start["backbone.blocks.0.mixer.memory.to_adaptive_step.0.weight"],
        rtol=0,
        atol=0,
    )
    assert not torch.equal(
        after["backbone.blocks.0.mixer.memory.memory_model_parameters.0"],
        start["backbone.blocks.0.mixer.memory.memory_model_parameters.0"],
    )


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SAVE_EVERY_S", 0.0)
    comparison = comparison_from(config(), "")
    entry = comparison.entries[0]
    whole = program.Training(comparison, entry, 0, {"steps": 6}, tmp_path / "whole")
    whole.train("whole")

    class Stopped(Exception):
        pass

    def stop(self: program.Training) -> None:
        save(self)
        if self.number == 3:
            raise Stopped

    save = program.Training.save
    monkeypatch.setattr(program.Training, "save", stop)
    with pytest.raises(Stopped):
        program.Training(comparison, entry, 0, {"steps": 6}, tmp_path / "cut").train("cut")
    monkeypatch.setattr(program.Training, "save", save)
    again = program.Training(comparison, entry, 0, {"steps": 6}, tmp_path / "cut")
    assert again.number == 3
    again.train("again")
    assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert again.losses == whole.losses
    assert [each[2] for each in again.curve] == [each[2] for each in whole.curve]


def test_models_whose_names_have_commas_can_be_chosen(tmp_path: Path) -> None:
    found = compared(tmp_path, "--only", "memory, frozen;floor", budgets=[{"steps": 1}])
    assert [record["model"] for record in found] == ["memory, frozen", "floor"]


def test_equal_time_is_time_of_training(tmp_path: Path) -> None:
    (record,) = compared(tmp_path, "--only", "floor", budgets=[{"seconds": 0.3}])
    assert record["model"] == "floor"
    assert 0.3 <= record["seconds"] < 3
    assert record["steps"] >= 1


def test_text_is_told_by_position_and_distance(tmp_path: Path) -> None:
    task = dict(name="text", tokens=64)
    found = compared(tmp_path, "--only", "memory", task=task, budgets=[{"steps": 1}], roles=["memory"])
    result = found[0]["results"]["64"]
    assert list(result["by_position"]) == ["0-31", "32-63"]
    assert sum(count for _, count in result["by_position"].values()) == result["answers"] == 8 * 64
    assert sum(count for _, count in result["by_distance"].values()) == 8 * 64
    assert 5 < result["score"] < 10
    assert 5 < result["shuffled"] < 10


def test_compression_is_read_off_the_last_token(tmp_path: Path) -> None:
    task, asking = dict(name="mad_compression", tokens=8), dict(lengths=[1], rows=8)
    (found,) = compared(tmp_path, "--only", "floor", task=task, evaluation=asking, budgets=[{"steps": 2}])
    assert found["results"]["8"]["answers"] == 8 * 7
    model = LastTokenReader(PaperModel(**{k: v for k, v in SMALL.items() if k != "kind"}).build(16), 8)  # type: ignore[arg-type]
    ids = torch.randint(0, 15, (2, 8))
    logits, _ = model.logits_and_state(ids)
    assert logits.shape == (2, 8, 16)
    assert_close(logits[:1], model.logits_and_state(ids[:1])[0])
    with pytest.raises(ValueError, match="sequences must be of 8 tokens, as it was made for, got 7"):
        model.hidden_states(ids[:, 1:])


def test_bins_and_distances_leave_nothing_out() -> None:
    assert ranges((0, 32, 128), 100) == [(0, 32), (32, 100)]
    seen = torch.tensor([[NEVER, NO_NAME, 1, 8, 9, 32, 33, 128, 129, 5000]])
    found = {name: is_in.nonzero()[:, 1].tolist() for name, is_in in distances(seen, 8).items()}
    assert found == {
        "inside the window (to 8)": [2, 3],
        "9-32": [4, 5],
        "33-128": [6, 7],
        "beyond 128": [8, 9],
        "never": [0],
        "no identifier": [1],
    }
    tally = Tally()
    tally.add("a", torch.tensor([1.0, 2.0]))
    tally.add("a", torch.tensor([6.0]))
    tally.add("b", torch.tensor([]))
    assert tally.means() == {"a": [3.0, 3]}


# ---- reports


def record(model: str, seed: int, score: float | None, **more: Any) -> dict[str, Any]:
    results = {"40": {} if score is None else {"score": score, "by_depth": {"0.000": score}}, "160": {"score": 0.25}}
    machine = dict(cpu="a processor", date="today", commit="abc")
    return (
        dict(
            **dict(key=f"{model}-{seed}", comparison="small", model=model, role=model, seed=seed, budget={"steps": 4}),
            **dict(metric="accuracy", parameters=1000, steps=4, seconds=1.0, results=results, writes_off=None),
            **dict(settings=dict(task=dict(name="mqar"), train={}, evaluation={}, model={}), machine=machine),
        )
        | more
    )


def test_a_report_leaves_what_is_missing_empty(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for seed in (0, 1):
        records.add(path, record("floor", seed, 0.2))
        records.add(path, record("memory", seed, 0.4 + 0.2 * seed))
    assert program.main(["report", str(path)]) == 0
    page = (tmp_path / "results.report" / "report.md").read_text()
    assert "| memory | 1,000 | 2 | 4 | 1 | 0.500 (0.400–0.600) | 0.250 |" in page
    assert "recovery" not in page
    records.add(path, record("ceiling", 0, 0.8))
    records.add(path, record("frozen", 0, None))
    assert program.main(["report", str(path)]) == 0
    page = (tmp_path / "results.report" / "report.md").read_text()
    assert "| memory | 1,000 | 2 | 4 | 1 | 0.500 (0.400–0.600) | 0.250 | 50% |" in page
    assert "| frozen | 1,000 | 1 | 4 | 1 |  | 0.250 |  |" in page
    assert "recovery at 160" not in page  # where floor and ceiling are alike there is nothing to recover
    assert "commit abc" in page
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["| model", "| ---", "| memory", "| frozen", "| floor", "| ceiling"]
    assert len(list((tmp_path / "results.report").glob("*.png"))) == 2


def test_a_ceiling_below_a_floor_is_none() -> None:
    group = {"floor": [record("floor", 0, 0.2), record("floor", 1, 0.9)], "ceiling": [record("ceiling", 0, 0.8)]}
    assert compare_report.recoveries(group, "40") == {}


def test_steps_take_turns_in_what_they_are_of(tmp_path: Path) -> None:
    turns = [dict(tokens=40, batch=3), dict(tokens=60)]
    comparison = program.loaded(written(tmp_path, turns=turns))
    (short, three), (long, batch) = comparison.turn(0), comparison.turn(1)
    assert (short.tokens, three, long.tokens) == (40, 3, 60)  # type: ignore[attr-defined]
    assert batch == comparison.training(0, 1).batch
    assert comparison.turn(2) == comparison.turn(0)
    plain = program.loaded(written(tmp_path))
    entry = plain.entries[0]
    assert program.key_of(plain, entry, 0, {"steps": 1}) != program.key_of(comparison, entry, 0, {"steps": 1})
    assert plain.turn(5) == (plain.make_task(), plain.training(0, 1).batch)


def test_a_report_takes_no_mean_over_different_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "results.jsonl", dict(task=dict(name="mqar"), train={"lr": 1}, evaluation={}, model={})
    records.add(path, record("memory", 0, 0.4))
    records.add(path, record("memory", 1, 0.4, settings=other))
    assert program.main(["report", str(path)]) == 2
    assert "results of small, 4 steps must be of one train, got several" in capsys.readouterr().err


def test_a_record_that_is_older_than_an_option_has_its_default(tmp_path: Path) -> None:
    path, newer = (
        tmp_path / "results.jsonl",
        dict(task=dict(name="mqar"), train={}, evaluation={"versions": {}}, model={}),
    )
    records.add(path, record("memory", 0, 0.4))
    records.add(path, record("memory", 1, 0.4, settings=newer))
    assert program.main(["report", str(path)]) == 0


# ---- mistakes


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(roles=["oracle"]), "roles must be among memory, frozen, floor, ceiling, got oracle"),
        (dict(budgets=[{"hours": 1}]), "a budget must be steps or seconds, above 0, got {'hours': 1}"),
        (dict(model=dict(kind="rnn")), "model.kind must be one of titans, mac, got 'rnn'"),
        (dict(model=SMALL | dict(width=3)), "model must hold settings of PaperModel, got width"),
        (dict(titel="x"), "must hold a comparison's .*, got titel"),
        (dict(seeds=3), "seeds must be a list of whole numbers, got 3"),
        (dict(seeds=[0, 0]), r"seeds must be at least one, and different ones, got \[0, 0\]"),
        (dict(budgets=[]), r"budgets must be at least one, and different ones, got \[\]"),
        (dict(task=dict(pairs=2)), "task.name must be the name of a task, got None"),
        (dict(train=dict(batch="2")), "--batch must be a whole number, got '2'"),
        (dict(train=dict(batch=0)), "--batch must be at least 1, got 0"),
        (dict(evaluation=dict(lengths=[])), "evaluation.lengths must be at least one, got none"),
        (dict(evaluation=dict(depths=3)), "evaluation.depths must be 0 for mqar, which has none, got 3"),
        (dict(model=SMALL | dict(memory_options=dict(foo=1))), "foo"),
        (dict(turns=[dict(keys=99)]), "must have the task's .* ids, got .* in turn 0"),
        (dict(task=dict(name="mad_compression")), r"mad_compression needs evaluation.lengths \[1\], got \(1, 2\)"),
    ],
)
def test_mistakes_are_one_sentence(
    more: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert program.main([str(written(tmp_path, **more)), "--out", str(tmp_path / "out.jsonl")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
