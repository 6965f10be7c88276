"""How much arithmetic a workload needs at least, whoever computes it: the numerator of "share of the matmul rate"."""

from __future__ import annotations

from benchmarks.speed.workloads import Case
from titans_pytorch.fast_weights.rules.orthogonal import NUM_ITERATIONS

Shape = tuple[int, int]

EXPANSION = 4  # NeuralMemory's default memory: MemoryMLP(dim_head, depth=2, expansion_factor=4.)


def memory_matrices(case: Case) -> list[Shape]:
    """The two matrices of the default memory, d -> h and h -> d."""
    d = case.memory.get("dim_head", case.memory["dim"])
    return [(d, EXPANSION * d), (EXPANSION * d, d)]


def chunk_matrices(case: Case) -> int:
    """How many surprises of one matrix there are: sequences * heads * complete chunks."""
    return case.batch * case.memory.get("heads", 1) * (case.tokens // case.memory["chunk_size"])


def useful_flops(case: Case, mode: str) -> float:
    """Multiplications and additions (2 per weight and row) of one call.

    Per token and head, with P = the elements of all memory matrices and P_0 those of the first one:

        store, forward on the keys                       2 P
        store, backward to activations (not below P_0)   2 (P - P_0)
        read from weights W and momentum M               4 P
        carry W and M to the next block                  4 P

    which for d -> h -> d (P = 2 d h) is 22 d h.  With spectral_norm_surprises every step must exist as a matrix: reads
    take one matrix (2 P), surprises are formed once (2 P), 14 d h in all, and each chunk's step goes through the
    Newton-Schulz products.  To that come queries, keys and values, and with several heads the product that combines
    them.  Gates, norms and activations count as nothing, and so do the triangular products inside a block, whose
    number is the engine's choice.  Backward costs twice the forward.
    """
    dim, heads = case.memory["dim"], case.memory.get("heads", 1)
    sizes = [rows * columns for rows, columns in memory_matrices(case)]
    total, first = sum(sizes), sizes[0]
    spectral = case.memory.get("spectral_norm_surprises", False)
    per_head = 2 * total + 2 * (total - first) + (4 * total if spectral else 8 * total)
    projections = 2 * dim * heads * case.memory.get("dim_head", dim) * (4 if heads > 1 else 3)
    flops = float(case.batch * case.tokens * (heads * per_head + projections))
    if spectral:
        flops += chunk_matrices(case) * sum(newton_schulz_flops(shape) for shape in memory_matrices(case))
    return flops * (3 if mode == "training" else 1)


def newton_schulz_flops(shape: Shape, iterations: int = NUM_ITERATIONS) -> float:
    """The cheaper, Gram form (as the library computes it): t t', P t and 4 small products per iteration, less 3."""
    rows, columns = min(shape), max(shape)
    return 4.0 * rows * rows * columns + 2.0 * rows**3 * (4 * iterations - 3)
