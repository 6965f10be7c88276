"""A `NeuralMemory` by the name of a paper: what each of them has beside the defaults, in one call."""

from __future__ import annotations

from typing import Any

from typing_extensions import Self

from titans_pytorch.memory.asking import AskedMemory
from titans_pytorch.memory.atlas import KEY_POWERS, WINDOW, atlas_options, omeganet_options
from titans_pytorch.memory.delta import delta_options
from titans_pytorch.memory.lact import CHUNK, lact_options
from titans_pytorch.memory.miras import miras_options
from titans_pytorch.memory.paper import paper_options


class PresetMemory(AskedMemory):
    """Ways to make a memory; it begins by storing every token under the one before it (`init_as_association`)."""

    @classmethod
    def made(cls, options: dict[str, Any]) -> Self:
        """A memory of these arguments."""
        memory = cls(**options)
        memory.init_as_association()
        return memory

    @classmethod
    def paper(
        cls,
        dim: int,
        heads: int = 1,
        chunk_size: int | tuple[int, int] = 16,
        *,
        token_gates: bool = False,
        **overrides: Any,
    ) -> Self:
        """The memory as the paper has it (`docs/paper.md`); every argument can be overridden.

        M(x) = x + LayerNorm(W_1 gelu(W_2 x)), four times as wide inside; convolution, SiLU and l2 norm of queries, keys
        and values; summed loss; gates for every parameter; surprises at the weights of every chunk's start; a normed
        and gated output. The paper does not say how anything starts: here memory is kept long, steps are small, and
        tokens are stored under the ones before them (`init_as_association`).

        token_gates: momentum and forgetting of every token, which reads what all before it have stored; gradients are
            taken at the memory of every chunk's start all the same, and forgetting has no gates of channels
        """
        return cls.made(paper_options(dim, heads, chunk_size, overrides, token_gates))

    @classmethod
    def delta(cls, dim: int, heads: int = 1, **overrides: Any) -> Self:
        """A linear memory with the gated delta rule, surprised at every token: exact, in chunks (`docs/rules.md`).

        Every argument can be overridden; momentum=True adds momentum. Projections and output are as in `paper`.
        """
        return cls.made(delta_options(dim, heads, overrides))

    @classmethod
    def omeganet(
        cls,
        dim: int,
        heads: int = 1,
        chunk_size: int = 16,
        *,
        token_gates: bool = True,
        window: int = WINDOW,
        key_powers: int = KEY_POWERS,
        **overrides: Any,
    ) -> Self:
        """The memory of OmegaNet (arXiv 2505.23735): steps follow a window of surprises (`docs/rules.md`).

        Every argument can be overridden; projections and output are as in `paper`. Steps are of every token, and
        gradients taken at the memory of every chunk's start; with token_gates=False steps are of every chunk, and it is
        chunks that a window counts.
        """
        return cls.made(omeganet_options(dim, heads, chunk_size, token_gates, window, key_powers, overrides))

    @classmethod
    def atlas(
        cls,
        dim: int,
        heads: int = 1,
        chunk_size: int = 16,
        *,
        token_gates: bool = True,
        window: int = WINDOW,
        key_powers: int = KEY_POWERS,
        **overrides: Any,
    ) -> Self:
        """The memory of Atlas (arXiv 2505.23735): that of `omeganet` with momentum, and steps made orthogonal.

        Every argument can be overridden. With token_gates=False steps are made at the ends of chunks, which costs as
        many fewer Newton-Schulz iterations.
        """
        return cls.made(atlas_options(dim, heads, chunk_size, token_gates, window, key_powers, overrides))

    @classmethod
    def miras(
        cls, kind: str, dim: int, heads: int = 1, chunk_size: int | tuple[int, int] = 16, **overrides: Any
    ) -> Self:
        """One of the memories of Miras (arXiv 2504.13173): yaad, moneta or memora (`docs/rules.md`).

        Every argument can be overridden; projections, output and gates are as in `paper`.
        """
        return cls.made(miras_options(kind, dim, heads, chunk_size, overrides))

    @classmethod
    def lact(cls, dim: int, heads: int = 1, chunk_size: int = CHUNK, **overrides: Any) -> Self:
        """The memory of LaCT: a gated network that stores long chunks, and whose norms stay (`docs/rules.md`).

        Every argument can be overridden; spectral_norm_surprises=True makes steps orthogonal.
        """
        return cls.made(lact_options(dim, heads, chunk_size, overrides))
