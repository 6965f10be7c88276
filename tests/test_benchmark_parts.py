"""Parts of the benchmarks that a run rests on, without the run."""

from __future__ import annotations

import importlib
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks.learning.loop import training
from benchmarks.machine import CHECKOUT, RESULTS
from benchmarks.records import add, load
from benchmarks.speed import conversations, decode_kernels, held, one_core, replay
from benchmarks.speed.measure import Side, Worker
from benchmarks.speed.worker import direct_form
from benchmarks.speed.workloads import Case
from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.fast_weights.rules.orthogonal import COEFFICIENTS, NUM_ITERATIONS, orthogonalised

PROGRAMS = [
    ".".join(file.relative_to(CHECKOUT).with_suffix("").parts)
    for file in sorted((CHECKOUT / "benchmarks").glob("*/*.py"))
    if not file.stem.endswith(("worker", "__init__"))
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_can_be_imported(name: str) -> None:
    importlib.import_module(name)


def test_of_several_records_with_one_key_the_last_counts(tmp_path: Path) -> None:
    table = tmp_path / "folder" / "table.jsonl"
    for seed, bits in ((1, 3.0), (0, 2.0), (1, 1.0)):
        add(table, dict(seed=seed, bits=bits))
    assert load(table, lambda record: (record["seed"],)) == [dict(seed=0, bits=2.0), dict(seed=1, bits=1.0)]


@pytest.mark.parametrize("name", ["recall", "family_stability"])
def test_recorded_tables_are_read(name: str) -> None:
    report = importlib.import_module(f"benchmarks.learning.{name}_report")
    if name == "recall":
        groups = report.grouped(RESULTS / "recall.jsonl")
        assert sum(map(len, groups.values())) == 60
        assert list(groups) == sorted(groups)
    else:
        assert len(report.runs(RESULTS / "family_stability.jsonl")) == 8


def test_the_loop_scales_rates_and_skips_what_is_not_finite() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def loss_of(step: int) -> torch.Tensor:
        return model.weight.sum() * (torch.inf if step == 1 else 1.0)

    found, weights = [], []
    for step in islice(training(model, optimizer, loss_of, lambda step, seconds: 0.5**step, clip=0.5), 3):
        found.append(step)
        weights.append(model.weight.item())
    assert [step.number for step in found] == [1, 2, 3]
    assert [step.is_taken for step in found] == [True, False, True]
    assert found[0].norm == pytest.approx(1.0)
    assert weights == pytest.approx([-1.0, -1.0, -1.25])


@torch.inference_mode()
def test_conversations_of_all_ways_are_the_same() -> None:
    found = conversations.decoding("lmm", conversations.QUICK)
    assert list(found) == ["rows", "groups", "one by one"]
    assert all(each["apart"] < 1e-5 and each["tokens_per_second"] > 0 for each in found.values())
    served = conversations.serving("lmm", conversations.QUICK)
    assert all(each["per_second"] > 0 for each in served.values())
    first, second = conversations.bytes_held("mal", conversations.QUICK)
    assert (first["tokens"], second["tokens"]) == (50, 100)
    assert abs(second["state_bytes"] - first["state_bytes"]) < 50 * 16 * 4  # a part of a chunk waits


def test_a_cache_of_keys_and_values_takes_what_is_said() -> None:
    plain = AttentionTransformer(num_tokens=11, dim=16, depth=3, attention="full", heads=2, dim_head=8)
    cache = plain(torch.zeros(1, 7, dtype=torch.long), return_cache=True)[1]
    assert sum(tensor.nbytes for each in cache for tensor in each) == conversations.cache_bytes(16, 3, 7)


def test_both_forms_of_the_products_are_one_function() -> None:
    steps = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(direct_form(steps, COEFFICIENTS, NUM_ITERATIONS), orthogonalised(steps))


def test_a_worker_measures_time_memory_and_products() -> None:
    case = Case("small", dict(dim=8, chunk_size=4), tokens=16)
    with Worker(Side(sys.executable, CHECKOUT), "cpu") as worker:
        worker.build(case, "float32")
        assert worker.ask("peak", mode="training")["peak_bytes"] >= 0
        assert worker.ask("time", mode="forward")["finite"]
        assert worker.ask("newton_schulz", form="gram", mode="training", matrices=[(2, 4, 8)])["seconds"] > 0


def test_what_a_call_asks_for_is_run_again_alone() -> None:
    x, table = torch.randn(4, 16, 8, requires_grad=True), nn.Embedding(3, 8)

    def run() -> None:
        places = torch.zeros(4, 16, dtype=torch.long)
        (torch.bmm(x, x.mT).sum(dim=-1, keepdim=True).expand(-1, -1, 8) * table(places)).sum().backward()

    asked = replay.recorded(run)
    assert [each.operation.overloadpacket.__name__ for each in asked if each.is_product] == ["bmm"] * 3
    assert not all(each.has_numbers for each in asked)
    products, passes = replay.parts(asked, large=4 * 16 * 8)
    assert len(products) == 3
    assert passes
    assert not any(each.is_product or each.elements < 4 * 16 * 8 for each in passes)
    for part in (products, passes):
        with replay.Recording() as again:
            seconds = replay.seconds_alone(part, turns=1)
        assert seconds > 0
        found = [each for each in again.asked if each.operation.overloadpacket.__name__ not in ("randn", "_to_copy")]
        assert [(each.operation, each.args) for each in found] == [(each.operation, each.args) for each in part] * 2


def test_kernels_and_calls_of_libraries_are_counted_in_generated_code() -> None:
    code = """
def call(args):
    extern_kernels.mm(reinterpret_tensor(arg0_1, (1, 8), (8, 1), 0), arg1_1, out=buf0)
    cpp_fused_add_mul_0(buf0, arg2_1, buf1)
    buf2 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf1, buf1, buf1)
"""
    assert decode_kernels.calls("cpp_fused_add_mul_0 = async_compile.cpp_pybinding(['float*'], '')" + code) == (1, 2)


def test_what_holds_more_than_before_is_bold() -> None:
    rows = held.table({"a memory": [10**7, 3 * 10**8]}, {"a memory": [2 * 10**7, 2 * 10**8]})
    assert rows[1:] == [["a memory", "10 MB", "**20 MB**", "300 MB", "200 MB"]]


def test_one_core_times_a_checkout() -> None:
    side = one_core.Timer(CHECKOUT)
    (seconds,) = side.ask("a", "forward")
    side.close()
    assert seconds > 0


def test_one_core_times_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"must be a checkout with titans_pytorch in it, got .* from elsewhere"):
        one_core.Timer(tmp_path)
