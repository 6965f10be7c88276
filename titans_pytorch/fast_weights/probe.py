"""What a memory model does, found out once by running it, without touching the random state.

A model must map (... n d) to (... n d), own nothing but floating-point parameters, be deterministic, causal, and keep
groups of tokens apart. How it uses its matrices decides which engines can run it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from titans_pytorch.fast_weights.answering import Answer, UnknownUse
from titans_pytorch.fast_weights.interface import LossFn
from titans_pytorch.fast_weights.opaque import OpaqueModel
from titans_pytorch.fast_weights.taps import Use

NUM_ROWS, NUM_CHUNKS, NUM_TOKENS = 2, 2, 3


class ModelTraits(NamedTuple):
    uses: tuple[Use, ...] | None  # how the matrices are used; None: not only in products
    mixes_tokens: bool  # whether a token's output depends on earlier tokens of its group


def inspect_model(model: nn.Module, dim: int, loss_fn: LossFn) -> ModelTraits:
    """Raises ValueError with the reason where a model cannot be a memory.  It may be on any device, meta included."""
    check_contents(model)
    with torch.device("cpu"):
        return traits_of(deepcopy(model).double(), dim, loss_fn)


def traits_of(model: nn.Module, dim: int, loss_fn: LossFn) -> ModelTraits:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) / max(1, p.numel()) ** 0.25
        for name, p in model.named_parameters()
    }
    x = torch.randn(NUM_TOKENS, dim, generator=generator, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        run = checked_forward(model, parameters, x)
        mixes_tokens = check_causal(run, x)
        uses = find_uses(model, parameters, x)
        if uses is None:
            check_opaque(model, parameters, x)
    check_loss(loss_fn, x)
    return ModelTraits(uses, mixes_tokens)


def check_contents(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not list(model.parameters()):
        raise ValueError(f"memory model {type(model).__name__} has no parameters, so there is nothing to memorise with")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"memory model must keep nothing outside its parameters, but owns the buffers {buffers}")
    if odd := [name for name, p in model.named_parameters() if not p.is_floating_point()]:
        raise ValueError(f"memory model must have floating-point parameters only, but {odd} are not")


Forward = Callable[[Tensor], Tensor]


def checked_forward(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Forward:
    """The model with these parameters, found to keep shapes and to give the same twice."""
    name = type(model).__name__

    def run(x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,))

    try:
        torch.manual_seed(1)
        out = run(x)
        torch.manual_seed(2)
        again = run(x)
        rows = run(torch.stack((x, x.flip(0))))
    except Exception as error:
        raise ValueError(f"memory model {name} fails on inputs of shape (... n {x.shape[-1]}): {error}") from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"memory model {name} must keep the shape (... n d): gave {tuple(x.shape)}, got {got}")
    if not torch.equal(out, again):
        raise ValueError(f"memory model {name} must be deterministic, but gave two answers to one input (dropout?)")
    if not (rows[0] - out).abs().max() <= 1e-8 * out.abs().max():
        raise ValueError(f"memory model {name} must treat every sequence of a batch by itself, but mixes them")
    return run


def check_causal(run: Forward, x: Tensor) -> bool:
    """Whether tokens are mixed; a token that sees later ones cannot be read as a stream."""
    out = run(x)
    scale = 1e-8 * out.abs().max()
    changed_last, changed_first = x.clone(), x.clone()
    changed_last[-1] += 1.0
    changed_first[0] += 1.0
    if not (run(changed_last) - out)[:-1].abs().max() <= scale:
        raise ValueError("memory model must be causal, but the output of a token depends on tokens after it")
    return bool((run(changed_first) - out)[1:].abs().max() > scale)


def check_loss(loss_fn: LossFn, x: Tensor) -> None:
    try:
        loss = loss_fn(x[None], x.flip(0)[None])
    except Exception as error:
        raise ValueError(f"store_memory_loss_fn fails on two tensors (... d): {error}") from error
    if not isinstance(loss, Tensor) or loss.shape != (1, len(x)):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"store_memory_loss_fn must map (... d) and (... d) to (...): gave (1, {len(x)}, d), got {got}"
        )


def find_uses(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> tuple[Use, ...] | None:
    """How the model uses its matrices if that is all products of tokens, else None.

    Found by recording one run in which every row has weights and every chunk vectors of its own, and believed only if
    each chunk comes out as it does alone.
    """
    scales = torch.tensor([[1.0, 0.7], [0.4, 1.3]], dtype=x.dtype)  # of (r n)
    chunks = torch.stack((x, x.flip(0))).expand(NUM_ROWS, NUM_CHUNKS, *x.shape)
    uses: list[Use] = []

    def product(name: str, x: Tensor, is_transposed: bool) -> Tensor:
        if x.shape[:-1] != chunks.shape[:-1]:
            raise UnknownUse(f"product of {name} with a tensor of shape {tuple(x.shape)}")
        uses.append(Use(name, is_transposed))
        weight = parameters[name].mT if is_transposed else parameters[name]
        return x @ weight * scales[:, :1, None, None]

    vectors = {name: p.reshape(-1) * scales[:, :, None, None] for name, p in parameters.items() if p.ndim < 2}
    try:
        with Answer(dict(model.named_parameters()), product, vectors):
            out = model(chunks)
        for row, chunk in ((0, 0), (0, 1), (1, 0), (1, 1)):
            own = {name: p * (scales[row, chunk] if p.ndim < 2 else scales[row, 0]) for name, p in parameters.items()}
            alone = functional_call(model, own, (chunks[row, chunk],))
            if not (out[row, chunk] - alone).abs().max() <= 1e-8 * alone.abs().max():
                return None
    except Exception:  # whatever a user's model does that is not foreseen here, the general engine may be able to do
        return None
    return tuple(uses) if all(p.ndim < 3 for p in parameters.values()) else None


def check_opaque(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> None:
    """The general engine runs the model on single groups under `vmap` and `grad`, with its parameters replaced."""
    opaque = OpaqueModel(model, lambda prediction, value: (prediction - value).square().mean(dim=-1))
    stacked = {name: torch.stack((p, p * 0.5)) for name, p in parameters.items()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        out = opaque.call(weights, x, {})
        return out.square().sum(), out

    try:
        _, out = torch.func.vmap(torch.func.grad(loss, has_aux=True))(stacked, torch.stack((x, x)))
    except Exception as error:
        raise ValueError(
            f"memory model {type(model).__name__} cannot be trained at test time: "
            f"it does not run under torch.func.vmap and torch.func.grad ({error})"
        ) from error
    expected = functional_call(model, {name: p * 0.5 for name, p in parameters.items()}, (x,))
    if not (out[1] - expected).abs().max() <= 1e-8 * expected.abs().max():
        raise ValueError(
            f"memory model {type(model).__name__} cannot be trained at test time: "
            "it reaches its parameters in a way in which they cannot be replaced (a copy made at construction?)"
        )


def can_be_looked_at(tensor: Tensor) -> bool:
    """Whether the host may know the values: not on the meta device, in a transform of torch.func or in a CUDA graph."""
    if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if type(tensor) not in (Tensor, nn.Parameter):  # fake, or a part of a sharded one
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def learns_from(model: nn.Module, loss_fn: LossFn, dim: int, weights: dict[str, Tensor]) -> bool:
    """Whether the loss of some tokens has a gradient at these weights.  weights: name -> (h ...)"""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, NUM_TOKENS, dim, generator=generator, dtype=torch.float64)
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        own = deepcopy(model).to_empty(device="cpu").double()
        # what storing does not change, a gain, is as at the start: storage that nobody has set says nothing
        at = {name: torch.zeros_like(p.detach()) for name, p in own.named_parameters()}
        at |= {name: weight.detach()[0].double().cpu().clone().requires_grad_() for name, weight in weights.items()}
        loss = loss_fn(functional_call(own, at, (keys,)), values).sum()
        wanted = [at[name] for name in weights]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return any(bool(gradient.any()) for gradient in gradients)
