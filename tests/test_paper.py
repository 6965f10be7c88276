"""The paper's memory: its options by definition, and `NeuralMemory.paper` through all that a memory has to stand."""

from __future__ import annotations

import copy
import itertools
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.oracle import oracle
from tests.support.streams import disturbed, in_pieces, randn
from titans_pytorch import MemoryAttention, MemoryMLP, NeuralMemory, load_state, save_state
from titans_pytorch.auditing.audit import audit, padded_with_mask, stream_with_state
from titans_pytorch.memory.convolution import CausalConvolution
from titans_pytorch.memory.costs import COSTS, Costs
from titans_pytorch.memory.head_norms import L2Norm

EXACT = dict(rtol=1e-9, atol=1e-10)
ALL = dict(
    qk_l2norm=True,
    conv_size=4,
    summed_loss=True,
    per_parameter_gates=True,
    channelwise_decay=True,
    learned_norm_gain=True,
    gated_output=True,
)


def paper(dim: int = 8, heads: int = 2, chunk_size: Any = 4, **overrides: Any) -> NeuralMemory:
    """In float64, every parameter moved away from where it starts."""
    torch.manual_seed(0)
    built = NeuralMemory.paper(dim, heads=heads, chunk_size=chunk_size, **overrides).double()
    return disturbed(built, 0.2)


# what `NeuralMemory.paper` is


def test_the_papers_memory() -> None:
    built = NeuralMemory.paper(64, heads=4)
    assert built.engine == "factored"
    assert built.layout == (16, 16, 16, 1), "surprises are taken at the weights of every chunk's start"
    assert built.dim_head == 16
    assert {name: tuple(p.shape) for name, p in built.fast_forms().items()} == {
        "model.weights.0": (16, 64),
        "model.weights.1": (64, 16),
    }
    assert isinstance(built.to_keys.activation, nn.SiLU)
    assert built.to_keys.convolution.weight.shape == (4, 64)
    assert all(p.grad is not None for p in trained(built, torch.randn(2, 40, 64)))


def trained(built: NeuralMemory, seq: Tensor) -> list[nn.Parameter]:
    built(seq)[0].square().mean().backward()
    return list(built.parameters())


def test_every_argument_can_be_overridden() -> None:
    built = NeuralMemory.paper(
        64, heads=2, chunk_size=(4, 8), batch_size=None, conv_size=None, activation=None, dim_head=8, momentum=False
    )
    assert built.layout == (4, 8, None, 1)
    assert isinstance(built.to_keys, nn.Linear)
    assert built.to_keys.weight.shape == (16, 64)
    assert built.to_momentum is None


@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_option_keeps_the_factored_engine(option: str, batch_size: int | None) -> None:
    built = NeuralMemory(8, 4, batch_size, **{option: ALL[option]})
    assert built.engine == "factored"
    assert NeuralMemory(8, 4, batch_size, **ALL).engine == "factored"


def test_without_the_options_nothing_has_changed() -> None:
    """Turning an option off by name is not to name it."""
    off = {name: None if name == "conv_size" else False for name in ALL}
    for more in ({}, {"heads": 2, "dim_head": 4, "post_rmsnorm": True, "momentum_order": 2}):
        built = NeuralMemory(8, 4, **more)
        named = NeuralMemory(8, 4, **off, **more)
        named.load_state_dict(built.state_dict())
        seq = torch.randn(2, 11, 8)
        assert torch.equal(built(seq)[0], named(seq)[0])
        assert built(seq)[1].tails == (None, None, None)


# against the oracle, through every cut

CHUNKS = [1, 4, (1, 4), (4, 2), (3, 2)]


@pytest.mark.parametrize("engine", ["factored", "dense", "general"])
@pytest.mark.parametrize("chunk_size", CHUNKS, ids=str)
def test_any_pieces_equal_the_oracle(chunk_size: Any, engine: str) -> None:
    store = chunk_size if isinstance(chunk_size, int) else chunk_size[1]
    built = paper(chunk_size=chunk_size, engine=engine, batch_size=2 * store)
    seq, stored = randn(2, 13, 8), randn(2, 13, 8, seed=1)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(2)) > 0.3
    options = dict(ALL, dim=8, dim_head=4, heads=2, chunk_size=chunk_size, batch_size=2 * store)
    options |= dict(activation=nn.SiLU(), default_step_transform_max_lr=0.3 / 4, max_weight_growth=10.0)
    with torch.no_grad():
        expected = oracle(
            built.state_dict(), built.memory_model, seq, store_seq=stored, store_mask=mask, **options
        ).retrieved
        for lengths in ([13], [1] * 13, [2, 3, 1, 7], [5, 8]):
            got, _ = in_pieces(built, seq, lengths, store_seq=stored, store_mask=mask)
            assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("conv_size", [1, 2, 5, 9])
def test_pieces_shorter_than_the_convolution(conv_size: int) -> None:
    built, seq = paper(conv_size=conv_size, chunk_size=3), randn(2, 20, 8)
    whole, last = built(seq)
    for lengths in ([1] * 20, [2] * 10, [1, 2, 3, 4, 5, 5]):
        got, state = in_pieces(built, seq, lengths)
        assert_close(got, whole, **EXACT)
        assert_close(state.tails, last.tails, **EXACT)


def test_spans_hand_the_convolution_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long call is projected span by span, and in training computed again."""
    built, seq = paper(batch_size=8), randn(2, 41, 8).requires_grad_()
    expected, last = built(seq)
    gradient = torch.autograd.grad(expected.square().sum(), seq)
    for kept in (Costs().kept_elements, 0):
        monkeypatch.setitem(COSTS, "cpu", Costs(span_tokens=1, kept_elements=kept))
        got, state = built(seq)
        assert_close(got, expected, **EXACT)
        assert_close(torch.autograd.grad(got.square().sum(), seq), gradient, **EXACT)
        assert_close(dict(state.updates), dict(last.updates), **EXACT)
    with torch.no_grad():
        assert_close(dict(built(seq)[1].updates), {name: w.detach() for name, w in last.updates.items()}, **EXACT)


def test_decoding_token_by_token_is_exact() -> None:
    built, seq = paper(chunk_size=4), randn(2, 30, 8)
    with torch.no_grad():
        whole, _ = built(seq)
        prompt, state = built(seq[:, :17])
        reads = [prompt]
        for t in range(17, 30):
            read, state = built(seq[:, t], state=state)
            reads.append(read)
    assert_close(torch.cat(reads, dim=1), whole, **EXACT)


# convolution


def test_a_convolution_is_the_one_of_torch() -> None:
    torch.manual_seed(0)
    ours, x = CausalConvolution(3, 4).double(), randn(2, 9, 3)
    weight = ours.weight.flip(0).t().unsqueeze(1)
    expected = nn.functional.conv1d(nn.functional.pad(x.mT, (3, 0)), weight, groups=3).mT
    got, tail = ours(x, ours.fresh_tail(2))
    assert_close(got, expected)
    assert torch.equal(tail, x[:, -3:])


def test_a_masked_token_is_a_zero_to_the_convolution() -> None:
    """Nothing of it is seen, not even a NaN; what comes after sees that there was one."""
    built, seq = paper(), randn(1, 12, 8)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, [2, 5, 6, 7]] = False
    stored = seq.clone()
    expected, last = built(seq, store_seq=stored, store_mask=mask)
    for junk in (7.0, float("nan")):
        stored[~mask] = junk
        got, state = built(seq, store_seq=stored, store_mask=mask)
        assert torch.equal(got, expected)
        assert torch.equal(state.tails.keys, last.tails.keys)
    gone = torch.cat((seq[:, :2], seq[:, 3:]), dim=1)
    assert not torch.equal(built(gone)[1].tails.keys, built(seq, store_mask=mask)[1].tails.keys)


def test_left_padding_that_is_masked_is_a_fresh_start() -> None:
    built, seq = paper(), randn(1, 8, 8)
    padded = torch.cat((randn(1, 4, 8, seed=1), seq), dim=1)
    mask = torch.arange(12)[None] >= 4
    _, fresh = built(seq)
    _, state = built(padded, store_mask=mask)
    assert_close(state.states, fresh.states, **EXACT)
    assert_close(state.tails[1:], fresh.tails[1:], **EXACT)


# the state

STATES = {
    "pickle": lambda state: copy.deepcopy(state.detach()),
    "to": lambda state: state.to(torch.float64),
    "detach": lambda state: state.detach(),
    "select": lambda state: state.select([0, 1]),
}


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("how", STATES)
def test_copies_of_a_state_go_on(how: str, length: int) -> None:
    built, seq, more = paper(), randn(2, length, 8), randn(2, 7, 8, seed=1)
    _, state = built(seq)
    assert torch.equal(built(more, state=STATES[how](state))[0], built(more, state=state)[0])


def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    built, seq, more = paper(), randn(2, 7, 8), randn(2, 7, 8, seed=1)
    _, state = built(seq)
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert torch.equal(built(more, state=loaded)[0], built(more, state=state)[0])


def test_beams_take_their_convolutions_along() -> None:
    built, seq, more = paper(), randn(3, 7, 8), randn(4, 6, 8, seed=1)
    _, state = built(seq)
    _, direct = built(seq[[2, 0, 0, 1]])
    assert_close(built(more, state=state.select([2, 0, 0, 1]))[0], built(more, state=direct)[0], **EXACT)
    _, direct = built(seq[[0, 0, 1, 1]])
    assert_close(built(more, state=state.select([0, 1]).repeat(2))[0], built(more, state=direct)[0], **EXACT)


def test_a_reset_row_begins_anew_and_the_others_go_on() -> None:
    built, seq, more = paper(), randn(2, 8, 8), randn(2, 9, 8, seed=1)
    _, state = built(seq)
    got, last = built(more, state=built.reset(state, torch.tensor([True, False])))
    untouched, _ = built(more, state=state)
    fresh, of_fresh = built(more)
    assert_close(got[1], untouched[1], **EXACT)
    # position 8 still belongs to a group of which nothing was read before: all reads are those of a fresh stream
    assert_close(got[0], fresh[0], **EXACT)
    assert_close(last.tails.keys[0], of_fresh.tails.keys[0], **EXACT)


def test_tails_keep_no_input_alive_and_stay_as_small() -> None:
    built, sizes = paper(), []
    for length in (5, 500):
        with torch.no_grad():
            _, state = built(randn(2, length, 8))
        sizes.append([tail.untyped_storage().nbytes() for tail in state.tails])
    assert sizes[0] == sizes[1] == [2 * 3 * 8 * 8] * 3


# the options one by one


def test_l2_norm_is_finite_at_and_around_zero() -> None:
    norm = L2Norm()
    for scale in (0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e6):
        x = (torch.ones(2, 4) * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(norm(x).square().sum() + norm(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        assert gradient.isfinite().all()
        assert second.isfinite().all()
        assert gradient.abs().max() <= 3000
    assert_close(norm(torch.randn(5, 4)).norm(dim=-1), torch.ones(5), rtol=1e-4, atol=1e-4)


def test_the_summed_loss_is_reported() -> None:
    torch.manual_seed(0)
    mean = NeuralMemory(8, 4).double()
    summed = NeuralMemory(8, 4, summed_loss=True, default_step_transform_max_lr=1 / 8).double()
    summed.load_state_dict(mean.state_dict())
    seq = randn(1, 12, 8)
    of_mean, of_sum = mean(seq, return_surprises=True), summed(seq, return_surprises=True)
    assert_close(of_sum[0], of_mean[0], **EXACT)
    assert_close(of_sum[2][0], of_mean[2][0] * 8, **EXACT)


def test_one_parameters_gates_do_not_reach_the_others() -> None:
    """θ of one matrix at zero: it stays, the others move. Full forgetting: only its weights are gone."""
    built, seq = paper(heads=1, channelwise_decay=False, batch_size=None), randn(1, 4, 8)
    sizes = len(built.fast_forms())
    before = built.init_weights(1)
    with torch.no_grad():
        built.to_adaptive_step[0].bias[0] = -1e9
        built.to_decay_factor[0].weight.zero_()
        built.to_decay_factor[0].bias.copy_(torch.tensor([-1e9, 1e9]))
    _, state = built(seq)
    still, moved = (state.states[0][name] - before[name] for name in built.fast_forms())
    assert sizes == 2
    assert not still.any()
    assert moved.any()
    step = state.states[1]["model.weights.1"][0]
    assert_close(state.states[0]["model.weights.1"], step, **EXACT)


def test_channels_are_outputs() -> None:
    """A column of a matrix that is forgotten all at once leaves the other columns alone."""
    built = paper(heads=1, per_parameter_gates=False, model=MemoryMLP(8, depth=1), momentum=False)
    with torch.no_grad():
        built.to_adaptive_step[0].bias.fill_(-1e9)
        built.to_adaptive_step[0].weight.zero_()
        built.to_decay_factor[1].weight.zero_()
        built.to_decay_factor[1].bias.copy_(torch.tensor([-1e9] * 3 + [1e9] + [-1e9] * 4))
    before, (_, state) = built.init_weights(1)["model.weights.0"], built(randn(1, 4, 8))
    after = state.states[0]["model.weights.0"]
    assert not after[..., 3].any()
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert_close(after[..., kept], before[..., kept], **EXACT)


def test_equal_gates_of_channels_are_one_gate() -> None:
    for chunk, batch in ((2, None), (2, 2)):
        shared, own = (
            paper(chunk_size=chunk, batch_size=batch, per_parameter_gates=False, channelwise_decay=channels)
            for channels in (False, True)
        )
        with torch.no_grad():
            rest = {name: p for name, p in shared.named_parameters() if "decay" not in name}
            for name, p in own.named_parameters():
                if name in rest:
                    p.copy_(rest[name])
            for linear in (shared.to_decay_factor[0], own.to_decay_factor[1]):
                linear.weight.zero_()
                linear.bias.fill_(-0.7)
        seq = randn(2, 13, 8)
        assert_close(own(seq)[0], shared(seq)[0], **EXACT)


def test_a_learned_gain_is_no_memory() -> None:
    built, seq = paper(), randn(2, 9, 8).requires_grad_()
    retrieved, state = built(seq)
    assert not any("gamma" in name for name in state.weights)
    assert not any("gamma" in name for name in state.updates)
    (gradient,) = torch.autograd.grad(retrieved.square().sum(), built.memory_norm_gamma)
    assert (gradient.abs().sum(dim=1) > 0).all()


def test_a_gated_output_is_normed_gated_and_combined() -> None:
    built, seq = paper(heads=1, dim=8), randn(2, 9, 8)
    with torch.no_grad():
        expected = built(seq)[0]
        built.combine_heads.weight.mul_(2)
        assert_close(built(seq)[0], 2 * expected, **EXACT)
        built.retrieve_gate[0].weight.zero_()
        half = built(seq)[0]
        built.retrieve_gate[-1] = nn.Identity()
        assert not built(seq)[0].any()
        built.retrieve_gate[-1] = nn.Threshold(1.0, 1.0)  # fully open
        assert_close(built(seq)[0], 2 * half, **EXACT)


@pytest.mark.parametrize("model", [lambda: MemoryAttention(4), lambda: nn.Linear(4, 4)], ids=["attention", "linear"])
@pytest.mark.parametrize("engine", ["factored", "general"])
def test_gates_of_parameters_with_other_models(model: Any, engine: str) -> None:
    """A model that mixes tokens is asked once for every parameter; the answers are those of the general engine."""
    seq = randn(2, 13, 8)
    built = paper(model=model(), engine=engine)
    reference = paper(model=model(), engine="dense")
    reference.load_state_dict(built.state_dict())
    assert_close(built(seq)[0], reference(seq)[0], **EXACT)


# what a memory has to stand


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_audit_passes(batch_size: int | None) -> None:
    built = paper(batch_size=batch_size)
    report = audit(built, randn(2, 14, 8), stream=stream_with_state, padded=padded_with_mask, window=0)
    report.check()
    assert all(finding.passed for finding in report.findings)
    assert not report.notes, "not even a NaN reaches back"


def test_bfloat16_autocast_is_close_and_trains() -> None:
    torch.manual_seed(0)
    built = NeuralMemory.paper(32, heads=2, chunk_size=4)
    seq = torch.randn(2, 64, 32)
    expected, _ = built(seq)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = built(seq)
    error = (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.02
    carried = itertools.chain(state.states[0].values(), state.states[1].values(), state.tails)
    assert all(w.dtype == torch.float32 for w in carried)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (built(torch.randn(2, 64, 32))[0].float() - 1).square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in built.parameters())
        optimizer.step()


def test_a_bfloat16_module_works() -> None:
    built = NeuralMemory.paper(8, heads=2, chunk_size=4).bfloat16()
    _, state = built(torch.randn(2, 9, 8).bfloat16())
    retrieved, _ = built(torch.randn(2, 3, 8).bfloat16(), state=state)
    retrieved.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_extreme_inputs_stay_finite(value: float) -> None:
    built = NeuralMemory.paper(8, heads=2, chunk_size=4)
    retrieved, _ = built(torch.full((1, 40, 8), value))
    retrieved.square().mean().backward()
    assert retrieved.isfinite().all()
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("lr", [0.02, 1.0])
def test_a_stream_of_noise_stays_finite(lr: float) -> None:
    torch.manual_seed(0)
    built = NeuralMemory.paper(16, heads=2, default_step_transform_max_lr=lr)
    retrieved, state = built(torch.randn(1, 2048, 16))
    retrieved.square().mean().backward()
    assert all(w.isfinite().all() for w in state.states[0].values())
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.filterwarnings("default")
def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    built = NeuralMemory.paper(8, heads=2, chunk_size=4, batch_size=8)
    seq, more = torch.randn(2, 9, 8), torch.randn(2, 3, 8)

    def step(seq: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        first, state = built(seq)
        return first, built(more, state=state)[0]

    compiled, gradients = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for each in (step, compiled):
        built.zero_grad()
        sum(out.square().sum() for out in each(seq, more)).backward()
        gradients.append([p.grad.clone() for p in built.parameters()])
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert_close(compiled(seq, more), step(seq, more), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_saved_memory_comes_back(tmp_path: Path) -> None:
    built = paper().float()
    built.save_pretrained(tmp_path)
    again = NeuralMemory.from_pretrained(tmp_path)
    seq = torch.randn(1, 9, 8)
    assert torch.equal(again(seq)[0], built(seq)[0])


FLAT = """
import resource, torch
from titans_pytorch import NeuralMemory
torch.manual_seed(0)
built, state, peaks = NeuralMemory.paper(16, heads=2), None, []
with torch.no_grad():
    for _ in range({pieces}):
        _, state = built(torch.randn(1, 2048, 16), state=state)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
def test_memory_is_flat_without_gradients() -> None:
    assert resource.getpagesize() > 0
    few, many = (
        int(subprocess.run([sys.executable, "-c", FLAT.format(pieces=n)], capture_output=True, check=True).stdout)
        for n in (4, 16)
    )
    assert many < few * 1.05
