"""What plans are made from: what things cost on each kind of device, and what a memory is as far as its cost goes."""

from __future__ import annotations

from typing import Literal, NamedTuple

Representation = Literal["factored", "channels", "built"]
"""How weights are kept: as sums, as sums with a share for each channel, or as tensors"""


class Costs(NamedTuple):
    """What decides the sizes of blocks and spans; those of a CPU were measured on two cores, in float32."""

    block_overhead: float = 5e8  # of starting a block, in multiplications
    carry_cost: float = 400  # of carrying an element of the weights through a block, in multiplications
    channel_cost: float = 400  # of scaling one factor of a write for one group
    channel_chunks: tuple[int, int] = (8, 16)  # fewer in a block are slower than one by one, more need too much memory
    built_elements: int = 2**22  # of the weights of a block, where they are built (17 MB in float32)
    built_in_training: int = 9 * 2**20  # the same where a backward pass may follow, with more operations to save
    span_tokens: int = 16_384  # of all rows together, that are projected at once
    span_elements: int = 2**26  # that training keeps of a span
    kept_elements: int = 2**28  # that training keeps of a call (1 GB in float32); more are computed again
    noted_elements: int = 2**25  # of a call that is computed again: what takes long to make is kept, up to so many
    block_elements: int = 2**26  # of all blocks of a call that are kept for a next layer rather than made again
    series_elements: int = 10 * 2**20  # of the weights and momenta of blocks that go through one loop
    loop_renewals: int = 4  # fewest of a loop in training: it begins with a copy, and what it ends with is kept as well
    loop_blocks: int = 8  # fewest of a loop in training, where no base is ever renewed
    wide_loop_tokens: int = 32  # of a batch of one chunk, up to which two that fit are enough for a loop of so many
    read_elements: int = 2**21  # of weights that are read together inside a loop, where no backward pass follows
    loop_chunks: int = 2  # of a batch, up to which each is a block of its own in a loop
    loop_tokens: int = 64  # of a batch, up to which there are loops; they keep the start of every block
    solved_writes: tuple[int, int] = (32, 64)  # at least and at most in a block whose renewals are solved for; 0: none
    at_once: bool = False  # blocks that are surprised at one base do not wait for each other


COSTS = {
    "cpu": Costs(),
    # Derived, not measured: an operation costs as much as hundreds of millions of multiplications, so blocks are as
    # large as memory allows, and there are as few loops as possible. docs/performance.md says how.
    "cuda": Costs(
        block_overhead=0.0,
        carry_cost=7000.0,
        built_elements=2**26,
        built_in_training=2**26,
        span_tokens=2**20,
        span_elements=2**30,
        kept_elements=2**31,
        noted_elements=2**28,
        block_elements=2**28,
        series_elements=2**28,
        read_elements=2**28,
        loop_renewals=1,
        loop_blocks=1,
        loop_chunks=1,
        loop_tokens=2**20,
        solved_writes=(64, 64),
        at_once=True,
    ),
}
"""By kind of device; the place to change them.  A kind that is not here is planned for as a CPU"""


class Sizes(NamedTuple):
    """What a memory is, as far as its cost goes."""

    heads: int
    writes_per_chunk: int
    matrices: tuple[tuple[int, int], ...]  # of the memory model
    num_elements: int  # of all its parameters
    num_channels: int  # entries of their last axes
    representation: Representation
    num_slots: int = 1  # tensors of every parameter that move: its weights and their momenta
    has_loop: bool = False  # whether several blocks can go through one loop
    can_fold: bool = False  # whether several blocks can be stored at once
    is_linear: bool = False  # whether renewals of every chunk can be solved for
    not_solved: str = ""  # why they are not, where they could be

    @property
    def width(self) -> int:
        """Numbers that go into and come out of all matrices for one token."""
        return sum(i + j for i, j in self.matrices)


def kept_elements(sizes: Sizes, costs: Costs) -> int:
    """About how many numbers autograd keeps of a row's chunk: some of every width, or some of every weight."""
    if sizes.representation == "built":
        return 10 * sizes.num_elements
    scaled = 2 * costs.channel_chunks[1] * sizes.num_channels if sizes.representation == "channels" else 0
    return sizes.writes_per_chunk * (6 * sizes.width + scaled)


def held_elements(sizes: Sizes) -> int:
    """About how many numbers a block has for a row's chunk."""
    return sizes.num_elements if sizes.representation == "built" else sizes.writes_per_chunk * sizes.width


def solved_writes(sizes: Sizes, costs: Costs, is_renewed: bool) -> tuple[int, str]:
    """How many writes of a linear memory go into a block whose renewals are solved for, and why none could.

    Products over pairs of writes grow with them, and blocks wait for each other: about half a key's width is best.
    is_renewed: whether the base is renewed after every chunk
    """
    fewest, most = costs.solved_writes
    num = min(max(fewest, sizes.matrices[0][0] // 2), most) if sizes.is_linear and is_renewed else 0
    if num < 2 * sizes.writes_per_chunk:
        return 0, ""
    return (0, sizes.not_solved) if sizes.not_solved else (num, "")
