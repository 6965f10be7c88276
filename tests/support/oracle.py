"""NeuralMemory as its specification reads: one sequence, one head, one chunk at a time, with real weight matrices.

Slow on purpose and independent of the library: only the memory models are shared. Give it float64 tensors.
Everything is differentiable; under `torch.no_grad()` no outer graph is kept.

Letters: `b` batch, `h` heads, `r` = b·h rows (head fastest), `t` tokens, `n` chunks, `u` writes per token, `m` width of
the layer, `d` width of a head, `o` momentum orders, `...` a memory weight's own shape. Positions i count from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.support.oracle_losses import NAMED, WITH_NUMBER, huber_of_tokens, mean_squared_error, sum_of_squares
from titans_pytorch import memory_models

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """The arguments of NeuralMemory with their defaults."""

    dim: int
    chunk_size: int | tuple[int, int] = 1
    batch_size: int | None = None
    dim_head: int | None = None
    heads: int = 1
    store_memory_loss_fn: Callable[[Tensor, Tensor], Tensor] = mean_squared_error
    adaptive_step_transform: Callable[[Tensor], Tensor] | str | None = None
    default_step_transform_max_lr: float = 1.0
    per_parameter_lr_modulation: bool = False
    max_mem_layer_modulation: float = 1.0
    per_head_learned_parameters: bool = True
    attn_pool_chunks: bool = False
    momentum: bool = True
    momentum_order: int = 1
    learned_momentum_combine: bool = False
    learned_combine_include_zeroth: bool = False
    num_kv_per_token: int = 1
    qkv_receives_diff_views: bool = False
    pre_rmsnorm: bool = True
    post_rmsnorm: bool = False
    qk_rmsnorm: bool = False
    max_grad_norm: float | None = None
    activation: nn.Module | None = None
    accept_weight_residual: bool = False
    spectral_norm_surprises: bool = False
    gated_transition: bool = False
    store_with_lookahead_value: bool = False
    max_weight_growth: float | None = None
    qk_l2norm: bool = False
    conv_size: int | None = None
    summed_loss: bool = False
    loss: str | None = None
    per_parameter_gates: bool = False
    channelwise_decay: bool = False
    learned_norm_gain: bool = False
    gated_output: bool = False
    window: int = 1
    key_powers: int = 1
    keep_lengths: bool = False
    apply_then_update: bool = False
    # read by `memory_model` only
    model: nn.Module | None = None
    default_model_kwargs: dict = field(default_factory=lambda: {"depth": 2, "expansion_factor": 4.0})
    mem_model_norm_add_residual: bool = True
    # these shape the initial parameters or the speed: read by nobody here
    init_adaptive_step_bias: float | None = None
    init_momentum_bias: float | None = None
    init_decay_bias: float | None = None
    use_accelerated_scan: bool = False

    @property
    def chunks(self) -> tuple[int, int]:
        """(retrieve, store)"""
        return (self.chunk_size, self.chunk_size) if isinstance(self.chunk_size, int) else self.chunk_size

    @property
    def orders(self) -> int:
        return self.momentum_order if self.momentum else 0

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.loss == "yaad":
            return mean_squared_error  # and what `Layer.held_to` makes of it
        if self.loss in NAMED:
            return NAMED[self.loss]
        if self.loss is not None:
            name, number = self.loss.split(":")
            return lambda pred, target: WITH_NUMBER[name](pred, target, float(number))
        return sum_of_squares if self.summed_loss else self.store_memory_loss_fn


@dataclass(frozen=True)
class OracleOutput:
    retrieved: Tensor  # (b t m)
    loss: Tensor  # (b h stored·u), without θ
    rates: Tensor  # (b h stored·u), θ
    updates: Weights  # (r n+1 ...), the weights as read: before every chunk, and after the last
    base: Weights  # (r ...), the base at the end
    last: Weights  # (r ...), the current weights at the end
    momenta: Weights  # (o r ...), empty without momentum


@dataclass(frozen=True)
class Written:
    """What one chunk has to store."""

    keys: Tensor  # (t·u d)
    values: Tensor
    rates: Tensor  # (p t·u)
    modulation: Tensor | None  # (p), λ
    thresholds: Tensor | None  # (t·u)


@dataclass
class Row:
    """The memory of one head of one sequence."""

    current: Weights  # w
    base: Weights  # where surprises are measured
    momenta: list[Weights]  # one per order
    trajectory: list[Weights]  # w_0, w_1, …
    written: list[Written] = field(default_factory=list)  # of each chunk
    loss: list[Tensor] = field(default_factory=list)  # each (u)
    rates: list[Tensor] = field(default_factory=list)  # each (u)


def norm_of(weights: Weights) -> Tensor:
    """Frobenius norm over all the parameters of one memory together."""
    return torch.cat([weight.flatten() for weight in weights.values()]).norm()


def limit_gradient(g: Tensor, limit: float) -> Tensor:
    """g·(max·tanh(‖g‖/max)/‖g‖): close to g where ‖g‖ is small, g itself at 0, never longer than max."""
    norm = g.norm()
    return g if norm == 0 else g * (limit * torch.tanh(norm / limit) / norm)


def orthogonalise(t: Tensor) -> Tensor:
    """Five Newton-Schulz iterations; vectors pass unchanged."""
    if t.ndim != 2:
        return t
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = t.shape[0] > t.shape[1]
    t = t.mT if is_tall else t
    t = t / t.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = t @ t.mT  # A
        t = a * t + (b * gram + c * gram @ gram) @ t  # at + Bt
    return t.mT if is_tall else t


@dataclass(frozen=True)
class Layer:
    """NeuralMemory: its parameters `p` by name, its memory model, its arguments."""

    p: Mapping[str, Tensor]
    model: nn.Module
    options: Options

    # layers, by the names of their parameters

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def pre_norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.p[f"{name}.weight"]) if self.options.pre_rmsnorm else x

    def head_norm(self, name: str, x: Tensor, head: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (self.p[f"{name}.gamma"][head, 0] + 1)

    def of_head(self, name: str, x: Tensor, head: int) -> Tensor:
        """A projection of tokens whose outputs are laid out (h ...), one head of it.  x: (t m) -> (t ...)"""
        return self.linear(name, x).unflatten(-1, (self.options.heads, -1))[..., head, :]

    def project(self, name: str, x: Tensor, head: int) -> Tensor:
        """Queries, keys or values of one head, for a whole sequence.  x: (t m) -> (t u d)"""
        o = self.options
        if o.conv_size is not None:
            out = self.convolve(name, self.of_head(f"{name}.linear", x, head), head)
        else:
            out = self.of_head(name if o.activation is None else f"{name}.0", x, head)  # (t u·d)
        out = out if o.activation is None else o.activation(out)
        return out.unflatten(-1, (-1, o.dim_head or o.dim))

    def convolve(self, name: str, x: Tensor, head: int) -> Tensor:
        """y_t = Σ_l weight_l x_t₋ₗ, every channel by itself.  x: (t u·d) -> (t u·d)"""
        weight = self.p[f"{name}.convolution.weight"].unflatten(-1, (self.options.heads, -1))[:, head]
        return torch.stack(
            [sum(weight[lag] * x[t - lag] for lag in range(min(len(weight), t + 1))) for t in range(len(x))]
        )

    def qk_norm(self, name: str, x: Tensor, head: int) -> Tensor:
        """Of queries and keys.  x: (... d)"""
        if self.options.key_powers > 1:
            x = sum(a[head] * x**power for power, a in enumerate(self.p["key_powers.coefficients"], start=1))
        if self.options.qk_l2norm:
            return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()
        return self.head_norm(name, x, head) if self.options.qk_rmsnorm else x

    def fast(self) -> dict[str, Tensor]:
        """The parameters of the memory model that are what it remembers."""
        slow = ["norm.gamma"] if self.options.learned_norm_gain else []
        return {name: p for name, p in self.model.named_parameters() if name not in slow}

    def apply(self, weights: Weights, x: Tensor, head: int) -> Tensor:
        """The memory model with these weights.  x: (t d) -> (t d)"""
        if self.options.learned_norm_gain:
            weights = weights | {"norm.gamma": self.p["memory_norm_gamma"][head]}
        return functional_call(self.model, weights, (x,))

    def initial(self, head: int) -> Weights:
        """The learned initial memory of a head."""
        of = {name: self.p[f"memory_model_parameters.{i}"] for i, name in enumerate(self.fast())}
        return {name: w[head] for name, w in of.items()} if self.options.per_head_learned_parameters else of

    # storing

    def pool(self, s_k: Tensor) -> Tensor:
        """r, what the gates of a chunk look at.  s_k, its stored tokens: (t m) -> (m)"""
        if not self.options.attn_pool_chunks:
            return s_k.mean(dim=0)
        return (self.linear("reduce_to_chunk_rep.to_attn_logits", s_k).softmax(dim=0) * s_k).sum(dim=0)

    def rates(self, s_k: Tensor, head: int) -> Tensor:
        """θ of each parameter, or of all.  s_k: (t m) -> (p t·u)"""
        sets = len(self.fast()) if self.options.per_parameter_gates else 1
        raw = self.of_head("to_adaptive_step.0", s_k, head).unflatten(-1, (sets, -1)).movedim(1, 0).flatten(1)
        transform, most = self.options.adaptive_step_transform, self.options.default_step_transform_max_lr
        off = 0.1 if transform == "sparse" else 0.0  # taken off, and nothing is below nothing
        return transform(raw) if callable(transform) else ((1 + off) * raw.sigmoid() - off).clamp(min=0) * most

    def surprise(self, at: Weights, of: Written, head: int) -> tuple[Weights, Tensor]:
        """u = -∇ Σ θ·loss(model(key; at), value), with its losses (t·u)."""
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            at = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in at.items()}
            losses = self.losses(at, of.keys, of.values, of.thresholds, head)
            grads = []
            for theta, w, loss in zip(of.rates.expand(len(at), -1), at.values(), losses, strict=True):
                (g,) = torch.autograd.grad(
                    (theta * loss).sum(), w, create_graph=keep_graph, retain_graph=True, materialize_grads=True
                )
                grads.append(g)
        if self.options.max_grad_norm is not None:
            grads = [limit_gradient(g, self.options.max_grad_norm) for g in grads]
        return {name: -g for name, g in zip(at, grads, strict=True)}, loss

    def over_window(self, row: Row, u: Weights, pooled: Tensor, head: int) -> Weights:
        """Σ γ_j u_j over the chunks of the window, all of them surprised at the base of now; a chunk's own γ is 1."""
        o = self.options
        if o.window == 1:
            return u
        gates = self.of_head("to_window.0", pooled, head).sigmoid().unflatten(0, (-1, o.window - 1))  # (p window-1)
        total = dict(u)
        for lag, before in enumerate(reversed(row.written[-(o.window - 1) :])):
            if before is None:
                continue
            older, _ = self.surprise(row.base, before, head)
            for index, name in enumerate(total):
                share = 1 if before.modulation is None else before.modulation[index]
                gate = gates[index if len(gates) > 1 else 0, lag]
                total[name] = total[name] + gate * share * older[name]
        return total

    def thresholds(self, s_k: Tensor, head: int) -> Tensor | None:
        """δ of every write, of a loss that has them.  s_k: (t m) -> (t·u)"""
        if self.options.loss != "yaad":
            return None
        return F.softplus(self.of_head("to_threshold.0", s_k, head)).flatten()

    def held_to(self, pred: Tensor, target: Tensor, thresholds: Tensor | None) -> Tensor:
        """(t·u d), (t·u d) -> (t·u)"""
        if thresholds is not None:
            return huber_of_tokens(pred, target, thresholds)
        return self.options.loss_fn(pred, target)

    def losses(self, at: Weights, keys: Tensor, values: Tensor, thresholds: Tensor | None, head: int) -> list[Tensor]:
        """What every parameter is held to: one loss for all, or one of each layer.  -> (t·u) each"""
        if not isinstance(self.model, memory_models.LayerwiseMemory):
            return [self.held_to(self.apply(at, keys, head), values, thresholds)] * len(at)
        found, x = [], keys
        for w in at.values():  # W_l: x_l W_l is to be v, x_l+1 = gelu(x_l W_l) / its length
            found.append(self.held_to(x @ w, values, thresholds))
            x = F.gelu(x @ w)
            x = x / ((x**2).sum(dim=-1, keepdim=True) + 1e-6).sqrt()
        return found

    def forget(self, w: Weights, pooled: Tensor, head: int) -> Weights:
        """(1 - α) w, with one α for all, one for each parameter, or one for each column of each."""
        if not self.options.channelwise_decay:
            alpha = self.of_head("to_decay_factor.0", pooled, head).sigmoid().expand(len(w))
            return {name: (1 - a) * weight for a, (name, weight) in zip(alpha, w.items(), strict=True)}
        alpha = self.of_head("to_decay_factor.1", self.linear("to_decay_factor.0", pooled), head).sigmoid()
        forgotten, first = {}, 0
        for name, weight in w.items():
            columns = weight.shape[-1] if weight.ndim else 1
            of_columns = alpha[first : first + columns]
            forgotten[name] = weight * (1 - of_columns if weight.ndim else 1 - of_columns[0])
            first += columns
        return forgotten

    def after(self, w: Weights, steps: Weights, pooled: Tensor, head: int) -> Weights:
        """w_j, of what is kept and the step."""
        kept = self.forget(w, pooled, head)
        return {name: kept[name] + steps[name] for name in kept}

    def step(self, row: Row, u: Weights, pooled: Tensor, head: int) -> Weights:
        """Momentum, orders chained: moves `row.momenta` on and returns step_j."""
        o, steps = self.options, {}
        eta = self.of_head("to_momentum.0", pooled, head).sigmoid().unflatten(0, (-1, o.orders)) if o.momentum else ()
        for index, name in enumerate(u):
            chain = [u[name]]
            for order in range(o.orders):
                eta_of = eta[index if o.per_parameter_gates else 0, order]
                chain.append(eta_of * row.momenta[order][name] + chain[-1])  # mᵒ_j = η mᵒ_j₋₁ + mᵒ⁻¹_j
                row.momenta[order][name] = chain[-1]
            steps[name] = chain[-1]
            if o.learned_momentum_combine:
                shares = self.of_head("to_learned_momentum_combine.0", pooled, head).softmax(dim=-1)
                chosen = chain if o.learned_combine_include_zeroth else chain[1:]
                steps[name] = sum(share * m for share, m in zip(shares, chosen, strict=True))  # Σ combine_o mᵒ_j
        return {name: orthogonalise(s) for name, s in steps.items()} if o.spectral_norm_surprises else steps

    def transition(self, row: Row, head: int) -> Weights:
        """The weights with which a new batch begins."""
        w, o = row.current, self.options
        if o.gated_transition:
            gate = self.p["transition_gate"].sigmoid()
            w = {name: row.base[name] + gate * (w[name] - row.base[name]) for name in w}
        if o.max_weight_growth is not None:
            norm, most = norm_of(w), o.max_weight_growth * norm_of(self.initial(head))
            w = {name: weight * (most / norm) for name, weight in w.items()} if most < norm else w
        if o.keep_lengths:  # of the weights w[:, j] of every output
            lengths = {name: weight.square().sum(dim=0).sqrt() for name, weight in self.initial(head).items()}
            own = {name: weight.square().sum(dim=0).sqrt() for name, weight in w.items()}
            w = {name: x / own[name] * lengths[name] if x.ndim == 2 else x for name, x in w.items()}
        return w

    def store_chunk(
        self, row: Row, head: int, s_k: Tensor, keys: Tensor, values: Tensor, stored: list[bool], prev: Weights | None
    ):
        """One complete chunk.  s_k: (t m), keys, values: (t u d), stored: its mask, prev: the other weights"""
        o = self.options
        shift = int(o.store_with_lookahead_value)  # the keys of token j go with the values of token j + shift
        pairs = [(t, t + shift) for t in range(len(stored) - shift)]
        written = [(k, v) for k, v in pairs if stored[k] and stored[v]]
        loss, theta = ({pair: keys.new_zeros(o.num_kv_per_token) for pair in pairs} for _ in range(2))
        if any(stored):
            pooled = self.pool(s_k[[t for t in range(len(stored)) if stored[t]]])
            u = {name: torch.zeros_like(w) for name, w in row.base.items()}
            of_chunk = None
            if written:
                of_keys, of_values = [k for k, _ in written], [v for _, v in written]
                at = row.base
                if prev is not None:  # base + mix_j · prevW_j₋₁
                    mix = self.of_head("to_learned_weight_residual_mix.0", pooled, head).sigmoid().squeeze()
                    at = {name: w + mix * prev[name] for name, w in row.base.items()}
                rates = self.rates(s_k[of_keys], head)
                of_chunk = Written(
                    keys[of_keys].flatten(0, 1),
                    values[of_values].flatten(0, 1),
                    rates,
                    modulation=None,
                    thresholds=self.thresholds(s_k[of_keys], head),
                )
                u, chunk_loss = self.surprise(at, of_chunk, head)
                loss |= zip(written, chunk_loss.split(o.num_kv_per_token), strict=True)
                theta |= zip(written, rates.mean(dim=0).split(o.num_kv_per_token), strict=True)
            if o.per_parameter_lr_modulation:
                modulation = self.of_head("to_layer_modulation.0", pooled, head).sigmoid() * o.max_mem_layer_modulation
                u = {name: part * u[name] for part, name in zip(modulation, u, strict=True)}  # λ_w u
                of_chunk = of_chunk and replace(of_chunk, modulation=modulation)
            u = self.over_window(row, u, pooled, head)
            row.written.append(of_chunk)
            steps = self.step(row, u, pooled, head)
            row.current = self.after(row.current, steps, pooled, head)
        else:
            row.written.append(None)
        row.loss += loss.values()
        row.rates += theta.values()

    def store(
        self, head: int, keys: Tensor, values: Tensor, mask: Tensor, prev: Weights | None, batch_size: int | None
    ) -> Row:
        """All complete chunks of one sequence.  keys, values: (t m), mask: (t), prev: (n+1 ...)"""
        w = self.initial(head)
        zeros = {name: torch.zeros_like(weight) for name, weight in w.items()}
        row = Row(current=w, base=w, momenta=[dict(zeros) for _ in range(self.options.orders)], trajectory=[w])
        _, c = self.options.chunks
        # a token that is not stored is a zero, also to a convolution
        s_k, s_v = (self.pre_norm("store_norm", torch.where(mask[:, None], x, 0.0)) for x in (keys, values))
        keys = self.qk_norm("k_norm", self.project("to_keys", s_k, head), head)
        values = self.project("to_values", s_v, head)
        for start in range(0, len(keys) - c + 1, c):
            chunk = slice(start, start + c)
            prev_before = None if prev is None else {name: weights[start // c] for name, weights in prev.items()}
            self.store_chunk(row, head, s_k[chunk], keys[chunk], values[chunk], mask[chunk].tolist(), prev_before)
            if batch_size is not None and (start + c) % batch_size == 0:  # i reaches a multiple of B
                row.base = row.current = self.transition(row, head)
            row.trajectory.append(row.current)
        return row

    # reading

    def read_head(self, row: Row, queries: Tensor, head: int) -> Tensor:
        """Position i reads w after ⌊i/c_r⌋·c_r tokens, all positions of one ⌊i/c_r⌋ together.  (t d) -> (t d)"""
        c_r, c_s = self.options.chunks
        at_position = queries if self.options.apply_then_update else F.pad(queries, (0, 0, 1, 0))  # 0: a zero query
        answers = []
        for start in range(0, len(at_position), c_r):  # start = ⌊i/c_r⌋·c_r
            answers.append(self.apply(row.trajectory[start // c_s], at_position[start : start + c_r], head))
        return torch.cat(answers)[-len(queries) :]

    def read(self, rows: list[Row], x: Tensor) -> Tensor:
        """One sequence, all heads.  x: (t m) -> (t m)"""
        o = self.options
        x = self.pre_norm("retrieve_norm", x)
        answers = []
        for head, row in enumerate(rows):
            queries = self.qk_norm("q_norm", self.project("to_queries", x, head).squeeze(1), head)
            y = self.read_head(row, queries, head)
            y = self.head_norm("multihead_rmsnorm", y, head) if o.post_rmsnorm or o.gated_output else y
            if o.gated_output:
                y = y * self.of_head("retrieve_gate.0", x, head).sigmoid()  # (t d)
            elif o.heads > 1:
                y = y * self.of_head("retrieve_gate.0", x, head).sigmoid()
            answers.append(y)
        merged = torch.cat(answers, dim=-1)  # (t h·d)
        return self.linear("combine_heads", merged) if o.heads > 1 or o.gated_output else merged


def oracle(
    parameters: Mapping[str, Tensor],
    model: nn.Module,
    seq: Tensor,
    /,
    *,
    store_seq: Tensor | None = None,
    store_mask: Tensor | None = None,
    prev_updates: Weights | None = None,
    ttt_batch_size: int | None = None,
    layer_kind: type[Layer] | None = None,
    **options,
) -> OracleOutput:
    """What NeuralMemory answers to a whole sequence, from a fresh state.

    parameters: a state_dict; model: see `memory_model`; seq: (b t m), or views of queries, keys and values (3 b t m);
    store_seq: (b t m), with views (2 b t m); store_mask: (b t); prev_updates: the `updates` of the previous layer
    (r n+1 ...); layer_kind: a `Layer` with another rule; options: the arguments of NeuralMemory.
    """
    options = Options(**options)
    layer = (layer_kind or Layer)(parameters, model, options)
    has_views, heads = options.qkv_receives_diff_views, options.heads
    batch_size = options.batch_size if ttt_batch_size is None else ttt_batch_size
    queries = seq[0] if has_views else seq
    to_store = store_seq if store_seq is not None else seq[1:] if has_views else seq
    keys, values = to_store if has_views else (to_store, to_store)
    mask = torch.ones(queries.shape[:2], dtype=torch.bool) if store_mask is None else store_mask
    rows, retrieved = [], []
    for b in range(len(queries)):
        of_heads = []
        for head in range(heads):
            prev = None if prev_updates is None else {name: w[b * heads + head] for name, w in prev_updates.items()}
            of_heads.append(layer.store(head, keys[b], values[b], mask[b], prev, batch_size))
        retrieved.append(layer.read(of_heads, queries[b]))
        rows += of_heads

    def reported(lists: list[list[Tensor]]) -> Tensor:
        flat = [torch.cat(tensors) if tensors else queries.new_zeros(0) for tensors in lists]
        return torch.stack(flat).unflatten(0, (-1, heads))

    def stacked(lists: list[list[Weights]]) -> Weights:
        return {name: torch.stack([torch.stack([w[name] for w in ws]) for ws in lists]) for name in lists[0][0]}

    return OracleOutput(
        retrieved=torch.stack(retrieved),
        loss=reported([row.loss for row in rows]),
        rates=reported([row.rates for row in rows]),
        updates=stacked([row.trajectory for row in rows]),
        base={name: w[0] for name, w in stacked([[row.base for row in rows]]).items()},
        last={name: w[0] for name, w in stacked([[row.current for row in rows]]).items()},
        momenta=stacked([[row.momenta[o] for row in rows] for o in range(options.orders)]) if options.orders else {},
    )


def memory_model(**options) -> nn.Module:
    """The memory model that NeuralMemory makes of its arguments, in float64."""
    o = Options(**options)
    width = o.dim_head or o.dim
    model = memory_models.MemoryMLP(width, **o.default_model_kwargs) if o.model is None else o.model
    return (memory_models.ResidualNorm(width, model) if o.mem_model_norm_add_residual else model).double()
