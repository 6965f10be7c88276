"""Kernels held to their twins.  `tests/test_kernels.py` runs this file in a process of its own: under Triton's
interpreter, a variable that has to be set before Triton is imported, or on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.support import kernel_twins as twins
from titans_pytorch import NeuralMemory
from titans_pytorch.fast_weights.norms import total_norm
from titans_pytorch.fast_weights.renewal import MAX_CARRIED_GRADIENT
from titans_pytorch.kernels import epilogues
from titans_pytorch.kernels.renewals import Precision, Renewals, renewal_loop, run_loop
from titans_pytorch.losses import summed_squared_error
from titans_pytorch.memory.pieces import StoredTokens
from titans_pytorch.memory_models import NORM_GAIN

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

# renewals, rows, tokens, dim, hidden
SIZES = [
    (2, 2, 8, 32, 64),
    (3, 2, 1, 16, 16),
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in (
            (1, 1, 20, 16, 32),
            (1, 2, 8, 32, 128),
            (6, 1, 16, 32, 128),
            (3, 2, 8, 16, 64),
            (2, 2, 16, 64, 128),
            (3, 2, 5, 32, 64),
            (3, 2, 16, 32, 48),
            (2, 1, 8, 64, 256),
            (2, 1, 12, 128, 32),
        )
    ),
]
PRECISIONS: list[Precision] = ["ieee", "tf32"]
RELATIVE = {"ieee": 1e-5, "tf32": 1e-5 if IS_INTERPRETED else 2e-2}  # the interpreter multiplies in float32


def inputs(
    n: int, r: int, c: int, d: int, h: int, is_limited: bool = False, dtype: torch.dtype = torch.float64
) -> Renewals:
    """A loop that moves its weights by about as much as they are; the last row's limit, if any, is far away."""
    torch.manual_seed(n * 1000 + c)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    def gate() -> Tensor:
        return 0.6 + 0.35 * torch.rand(n, r, dtype=dtype, device=DEVICE)

    state = drawn(r, 4, d, h) * torch.tensor([0.15, 0.15, 0.03, 0.03], dtype=dtype, device=DEVICE).view(1, 4, 1, 1)
    limit = None
    if is_limited:
        limit = 0.5 * state[:, :2].flatten(1).norm(dim=1)
        limit[1:] = 1e3
    tokens = [drawn(n, r, c, d) for _ in range(3)]
    descents = -torch.rand(n, r, c, dtype=dtype, device=DEVICE) * 2 / d
    return Renewals(*tokens[:2], descents, tokens[2], gate(), gate(), 1 + 0.3 * drawn(r, d), state, limit)


def mapped(fn: Callable[[Tensor], Tensor], given: Renewals) -> Renewals:
    return given._replace(**{name: fn(tensor) for name, tensor in given._asdict().items() if tensor is not None})


def single(given: Renewals) -> Renewals:
    return mapped(Tensor.float, given)


def near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Equal, but for what is small beside the largest entry."""
    largest = expected.detach().abs().max().item()
    assert_close(found.double(), expected, rtol=relative, atol=relative * largest)


# ---- the loop


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("is_limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_loop_is_the_librarys(sizes: tuple[int, ...], is_limited: bool, precision: Precision) -> None:
    given = inputs(*sizes, is_limited)
    reads, last, states, norms = twins.loop_by_library(*given)
    found = run_loop(single(given), precision, keeps_states=True)
    near(found.reads, reads, RELATIVE[precision])
    near(found.last, last, RELATIVE[precision])
    assert found.states is not None
    near(found.states, states, RELATIVE[precision])
    if given.limit is not None:
        assert (norms[:, 0] > given.limit[0]).any(), "nothing was limited"
        assert found.shrinks is not None
        near(found.shrinks, (given.limit / norms).clamp(max=1), RELATIVE[precision])
    bare = run_loop(single(given), precision, keeps_states=False)
    assert bare.states is None
    if IS_INTERPRETED:
        assert_close((bare.reads, bare.last), (found.reads, found.last), rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("is_limited", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_gradient_is_the_librarys(sizes: tuple[int, ...], is_limited: bool, precision: Precision) -> None:
    given = inputs(*sizes, is_limited)
    expected, found = gradients_of_both(given, precision)
    for name, of_library in expected._asdict().items():
        if of_library is not None:
            near(getattr(found, name), of_library, RELATIVE[precision] * (1 if precision == "ieee" else 5))
    if is_limited:
        assert expected.limit is not None
        assert expected.limit[0] != 0


def gradients_of_both(given: Renewals, precision: Precision, scale: float = 1.0) -> tuple[Renewals, Renewals]:
    """Gradients of a random projection of reads and last state: of the library in float64, of the kernels.

    scale: of what comes in at the last state
    """

    def gradients(given: Renewals, run: Callable[[Renewals], tuple[Tensor, ...]]) -> Renewals:
        leaves = mapped(lambda tensor: tensor.detach().requires_grad_(), given._replace(stores=None))
        outs = run(leaves._replace(stores=given.stores))
        torch.manual_seed(0)
        of_outs = [torch.randn(out.shape, dtype=torch.float64) for out in outs]
        of_outs = [(of_out * by).to(out) for of_out, by, out in zip(of_outs, (1.0, scale), outs, strict=True)]
        tensors = [tensor for tensor in leaves if tensor is not None]
        return Renewals(*torch.autograd.grad(outs, tensors, of_outs))

    by_library = gradients(given, lambda leaves: twins.loop_by_library(*leaves)[:2])
    return by_library, gradients(single(given), lambda leaves: renewal_loop(*leaves, precision=precision))


def test_gradients_too_large_are_limited_as_in_the_library() -> None:
    given, scale = inputs(3, 2, 8, 16, 32), 1e3 * MAX_CARRIED_GRADIENT
    expected, found = gradients_of_both(given, "ieee", scale)
    assert expected.state.norm() < 0.1 * scale, "nothing was limited"
    for name in ("state", "eta", "keep", "keys"):
        near(getattr(found, name), getattr(expected, name), 1e-4)


@pytest.mark.parametrize("is_limited", [False, True], ids=["free", "limited"])
def test_what_is_not_finite_stays_in_its_row_and_after_its_renewal(is_limited: bool) -> None:
    given = single(inputs(3, 2, 8, 16, 32, is_limited))
    broken = given._replace(keys=given.keys.clone())
    broken.keys[1, 0, 3] = torch.nan
    (fine, _), (reads, last) = renewal_loop(*given, precision="ieee"), renewal_loop(*broken, precision="ieee")
    assert_close(reads[:, 1], fine[:, 1], rtol=0, atol=0)
    assert last[1].isfinite().all()
    assert_close(reads[:2, 0], fine[:2, 0], rtol=0, atol=0)
    assert reads[2, 0].isnan().all()
    assert last[0].isnan().any()
    leaves = mapped(lambda tensor: tensor.detach().requires_grad_(), broken)
    reads, last = renewal_loop(*leaves, precision="ieee")
    tensors = [tensor for tensor in leaves if tensor is not None]
    for name, gradient in zip(Renewals._fields, torch.autograd.grad((reads.sum() + last.sum()), tensors), strict=False):
        of_rows = gradient if name in ("gain", "state", "limit") else gradient.movedim(1, 0)
        assert of_rows[1].isfinite().all(), name
        assert name == "limit" or of_rows[0].isnan().any(), name


def test_a_chunk_that_stores_nothing_leaves_weights_and_momenta() -> None:
    given = with_gaps(inputs(3, 2, 8, 16, 32, True))
    reads, last, *_ = twins.loop_by_library(*given)
    for precision in PRECISIONS:
        found = renewal_loop(*single(given), precision=precision)
        near(found[0], reads, RELATIVE[precision])
        near(found[1], last, RELATIVE[precision])
    expected, gradients = gradients_of_both(given, "ieee")
    for name in ("state", "values", "gain", "limit"):
        near(getattr(gradients, name), getattr(expected, name))
    near(gradients.keep * given.stores, expected.keep * given.stores)


def with_gaps(given: Renewals) -> Renewals:
    """The first row stores nothing in the middle, the second nothing at first."""
    stores = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=given.keep.dtype, device=DEVICE)
    keep, eta = (torch.where(stores > 0, gate, 1.0) for gate in (given.keep, given.eta))
    return given._replace(stores=stores, keep=keep, eta=eta, descents=given.descents * stores.unsqueeze(2))


def test_what_has_no_descent_is_only_forgotten() -> None:
    given = single(inputs(3, 2, 8, 16, 32))
    given = given._replace(descents=torch.zeros_like(given.descents), state=given.state * 1.0)
    given.state[:, 2:] = 0
    _, last = renewal_loop(*given, precision="ieee")
    near(last[:, :2], (given.state[:, :2] * given.keep.prod(dim=0)[:, None, None, None]).double())


def test_pieces_are_the_whole() -> None:
    given = single(inputs(3, 2, 8, 16, 32, True))
    reads, last = renewal_loop(*given, precision="ieee")
    state, pieces = given.state, []
    for piece in (slice(0, 1), slice(1, 3)):
        front = [tensor[piece] for tensor in given[:6]]
        found, state = renewal_loop(*front, given.gain, state, given.limit, precision="ieee")
        pieces.append(found)
    assert_close((torch.cat(pieces), state), (reads, last), rtol=0, atol=0)


def wide(n: int, r: int, c: int, d: int, h: int) -> dict[str, Tensor]:
    """Tensors of other sizes that belong together."""
    return single(inputs(n, r, c, d, h))._asdict()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(keys=torch.zeros(2, 3, 8)), ValueError, "keys must have the shape"),
        (dict(gain=torch.zeros(2, 3)), ValueError, r"gain must have the shape \(2, 32\)"),
        (dict(eta=torch.zeros(3, 2, dtype=torch.float64)), TypeError, "eta must be of dtype float32"),
        (dict(limit=torch.zeros(3)), ValueError, r"limit must have the shape \(2,\)"),
        (dict(state=torch.zeros(2, 4, 32, 40)), ValueError, "hidden a multiple of 16"),
        (wide(3, 2, 17, 128, 64), ValueError, "at most 2048 features in ieee"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    given = single(inputs(3, 2, 8, 32, 64))._replace(**change)
    with pytest.raises(error, match=words):
        renewal_loop(*given)


# ---- a whole memory


@pytest.mark.parametrize(
    "summed_loss, growth",
    [pytest.param(False, None, marks=pytest.mark.slow), (True, 1.1)],
    ids=["mean", "sum, limited"],
)
def test_a_memory_by_kernels_is_the_memory(summed_loss: bool, growth: float | None) -> None:
    """What is read, the state, and the gradient of every parameter; one token after the last whole chunk."""
    torch.manual_seed(0)
    options = dict(learned_norm_gain=True, summed_loss=summed_loss, max_weight_growth=growth)
    model, rate = dict(depth=2, expansion_factor=2.0), dict(init_adaptive_step_bias=-3.0)
    memory = NeuralMemory(32, 8, 8, 16, 2, default_model_kwargs=model, **rate, **options).double().to(DEVICE)
    with torch.no_grad():
        memory.memory_norm_gamma.normal_(std=0.3)
    seq = torch.randn(2, 25, 32, dtype=torch.float64, device=DEVICE)
    expected, state = memory(seq)
    reads, last = by_kernels(memory, seq)
    near(reads, expected.detach())
    first, second = state.current.values()
    near(last[:, 0], first.detach())
    near(last[:, 1], second.mT.detach())
    if growth is not None:
        grown = total_norm(state.current) / total_norm(memory.initial_weights()).repeat(2)
        assert grown.isclose(torch.full_like(grown, growth)).any(), "nothing was limited"
    parameters = dict(memory.named_parameters())
    of_reads = torch.randn_like(expected)
    found, gradients = (
        torch.autograd.grad((out * of_reads).sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
        for out in (reads, expected)
    )
    for name, a, b in zip(parameters, found, gradients, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            near(a, b, 1e-4)


def by_kernels(memory: NeuralMemory, seq: Tensor) -> tuple[Tensor, Tensor]:
    """What is read from a fresh state, and the last state.

    A chunk reads before it is stored, and reads lag one token behind: the first token is put before itself.
    """
    chunk, tails = memory.layout.store_chunk, memory.fresh_tails(len(seq))
    num_stored = (seq.shape[1] - 1) // chunk * chunk
    whole = seq[:, :num_stored]
    writes = memory.project_writes(StoredTokens(whole, whole, None), chunk, seq.dtype, tails).writes
    normed = memory.retrieve_norm(seq)
    queries, _ = memory.queries(normed, tails.queries)
    queries = torch.cat((queries[:, :1], queries), dim=1)
    lagging = queries[:, :num_stored].unflatten(1, (-1, chunk))
    per_loss = 2 if memory.evolution.model.loss_fn is summed_squared_error else 2 / writes.keys.shape[-1]
    gates = writes.gates.any
    first, second = memory.init_weights(len(seq)).values()
    state = torch.stack((first, second.mT, torch.zeros_like(first), torch.zeros_like(first)), dim=1)
    limit = None
    if memory.max_weight_growth is not None:
        limit = (memory.max_weight_growth * total_norm(memory.initial_weights())).repeat(len(seq))
    given = Renewals(
        *(x.transpose(0, 1) for x in (writes.keys, writes.values, -per_loss * writes.rates.any, lagging)),
        *(gates.factors[name][0].exp().T for name in ("keep", "momentum")),
        writes.slow[NORM_GAIN] + 1,
        state,
        limit,
    )
    reads, last = renewal_loop(*single(given), precision="ieee")
    reads, last = reads.double().transpose(0, 1).flatten(1, 2), last.double()
    w, v = last[:, 0], last[:, 1]
    rest = queries[:, num_stored:]
    rest = rest + given.gain.unsqueeze(1) * F.layer_norm(F.gelu(rest @ w) @ v.mT, rest.shape[-1:])
    return memory.merge(torch.cat((reads, rest), dim=1)[:, 1:], normed), last


# ---- epilogues


@pytest.mark.parametrize("r, c, d", [(2, 8, 32), (3, 16, 64), (1, 5, 48), (2, 300, 16), (1, 3, 384)])
def test_norm_error_and_its_gradient(r: int, c: int, d: int) -> None:
    torch.manual_seed(0)
    z2, keys, values = (torch.randn(r, c, d, dtype=torch.float64, device=DEVICE) for _ in range(3))
    descents = -torch.rand(r, c, dtype=torch.float64, device=DEVICE)
    gain = 1 + torch.randn(r, d, dtype=torch.float64, device=DEVICE)
    leaves = [x.requires_grad_() for x in (z2, keys, values, descents, gain)]
    expected = twins.norm_error(*leaves)
    of_error = torch.randn_like(z2)
    of_z2, of_keys, of_values, of_descents, of_gain = torch.autograd.grad(expected[2], leaves, of_error)

    plain = [x.detach().float() for x in leaves]
    found = epilogues.norm_error(*plain)
    for a, b in zip(found, expected, strict=True):
        near(a, b.detach())
    backward = epilogues.norm_error_backward(of_error.float(), *found, *plain[1:])
    for a, b in zip(backward, (of_z2, of_keys, of_descents, of_gain), strict=True):
        near(a, b)
    near(-backward[1], of_values)


@pytest.mark.parametrize("shape", [(3, 8, 128), (1, 5), (2, 70, 64)])
def test_gelu_error_and_its_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    of_act, z1, of_error, of_other = (torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(4))
    z1.requires_grad_()
    expected = twins.gelu_error(of_act, z1)
    (of_z1,) = torch.autograd.grad((torch.nn.functional.gelu(z1), expected), z1, (of_other, of_error))
    near(epilogues.gelu_error(of_act.float(), z1.detach().float()), expected.detach())
    given = [x.detach().float() for x in (of_other, of_error, of_act, z1)]
    near(epilogues.gelu_error_backward(*given), of_z1)


@pytest.mark.parametrize("r, d, h", [(2, 32, 128), (3, 16, 64), (1, 48, 100)])
def test_a_step_and_its_gradient(r: int, d: int, h: int) -> None:
    torch.manual_seed(0)
    state, surprise = (torch.randn(r, parts, d, h, dtype=torch.float64, device=DEVICE) for parts in (4, 2))
    keep, eta = (torch.rand(r, dtype=torch.float64, device=DEVICE) for _ in range(2))
    leaves = [x.requires_grad_() for x in (state, surprise, keep, eta)]
    expected = twins.step(*leaves)
    of_new = torch.randn_like(expected)
    plain = [x.detach().float() for x in leaves]
    near(epilogues.step(*plain), expected.detach())
    found = epilogues.step_backward(of_new.float(), plain[0], *plain[2:])
    for a, b in zip(found, torch.autograd.grad(expected, leaves, of_new), strict=True):
        near(a, b)


def test_epilogues_keep_rows_apart() -> None:
    z2, keys, values = (torch.randn(2, 8, 32, device=DEVICE) for _ in range(3))
    descents, gain = -torch.rand(2, 8, device=DEVICE), torch.rand(2, 32, device=DEVICE)
    z2[0, 3] = torch.nan
    normed, rstd, error = epilogues.norm_error(z2, keys, values, descents, gain)
    assert error[1].isfinite().all()
    found = epilogues.norm_error_backward(error, normed, rstd, error, keys, values, descents, gain)
    assert all(each[1].isfinite().all() for each in found)
