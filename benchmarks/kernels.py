"""What the kernels of `titans_pytorch.kernels` need of a GPU, found by compiling them ahead of time; none is needed.

    python -m benchmarks.kernels                   # needs triton: pip install -e '.[triton]'
    python -m benchmarks.kernels --only backward   # cases whose name has this in it; prints, and records nothing

Registers of a thread, bytes of its stack, and instructions that load from there or store to it (spills) are those of
the machine code, by the tool that comes with triton. Recorded in benchmarks/results/kernels.json and docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine import DOCS, RESULTS, describe_machine
from benchmarks.pages import markdown, put
from titans_pytorch.fast_weights.renewal import MAX_CARRIED_GRADIENT
from titans_pytorch.kernels import compilation, epilogues
from titans_pytorch.kernels.compilation import Precision
from titans_pytorch.kernels.loop import loop_kernel
from titans_pytorch.kernels.loop_backward import loop_backward_kernel
from titans_pytorch.kernels.loop_tiled import tiled_loop_kernel

ARCHITECTURES = {80: "A100", 90: "H100"}
NUMBERS = {"count", "rows", "length"}
"""Arguments that are no tensors"""

FOR_MASKS = frozenset({"stores"})
"""Tensors that are there where some chunks may store nothing"""

FOR_BACKWARD = frozenset({"states", "shrinks"})
"""Tensors that are not there where no backward pass follows"""

CHOSEN = ("kernel", "dim", "hidden", "tokens", "products", "tile", "warps")
FOUND = ("registers", "stack", "spills", "shared")
"""Of a record: what is compiled, what it needs"""


class Case(NamedTuple):
    """A kernel with all that it is compiled for."""

    name: str
    kernel: Any
    sizes: tuple[int, ...]  # dim, hidden, tokens
    precision: str
    constants: dict[str, Any]  # options of the compiler among them
    absent: frozenset[str] = frozenset()  # tensors that are None
    is_trial: bool = False  # not what `renewal_loop` would run


def loops(dim: int, hidden: int, tokens: int, precision: Precision) -> Iterator[Case]:
    """The loop without and with a backward pass after it, and the backward pass."""
    sizes = (dim, hidden, tokens)
    if compilation.stays_in_registers(*sizes, precision):
        name, kernel, constants = "loop", loop_kernel, compilation.of_loop(*sizes, precision)
    else:
        name, kernel, constants = "tiled loop", tiled_loop_kernel, compilation.of_tiled_loop(*sizes, precision)
    yield Case(name, kernel, sizes, precision, constants, FOR_BACKWARD | FOR_MASKS)
    yield Case(f"{name}, states kept", kernel, sizes, precision, constants, FOR_MASKS)
    yield backward(*sizes, precision)


def backward(dim: int, hidden: int, tokens: int, precision: Precision, **change: int) -> Case:
    """The backward pass; change: what is tried in place of what is run"""
    sizes = (dim, hidden, tokens)
    constants = compilation.of_backward(*sizes, precision) | dict(BOUND=MAX_CARRIED_GRADIENT) | change
    return Case("loop backward", loop_backward_kernel, sizes, precision, constants, FOR_MASKS, is_trial=bool(change))


def trials() -> Iterator[Case]:
    """What was decided against: other homes of weights and momenta, larger tiles, other numbers of warps."""
    for dim, hidden, precision, stay, warps in (
        (32, 128, "tf32", False, 8),
        (32, 128, "ieee", True, 8),
        (32, 128, "ieee", False, 8),
        (64, 128, "tf32", True, 8),
        (64, 128, "tf32", True, 16),
        (64, 128, "ieee", False, 8),
    ):
        sizes = (dim, hidden, 16)
        constants = compilation.of_loop(*sizes, precision) | dict(MOMENTA_STAY=stay, num_warps=warps)
        name = f"loop, states kept, momenta in {'registers' if stay else 'memory'}"
        yield Case(name, loop_kernel, sizes, precision, constants, FOR_MASKS, is_trial=True)
    yield backward(16, 64, 16, "tf32", T=32)
    yield backward(32, 128, 16, "tf32", T=64)
    yield backward(32, 128, 16, "tf32", T=128)
    yield backward(64, 128, 16, "tf32", num_warps=4)
    yield backward(64, 128, 16, "tf32", T=64)


def others() -> Iterator[Case]:
    """The epilogues, at the width of a head and at that of a whole model."""
    for dim, hidden, tokens in ((32, 128, 16), (384, 1536, 64)):
        like = torch.empty(1, tokens, dim, device="meta"), torch.empty(1, 4, dim, hidden, device="meta")
        of_tokens, of_layers = (sizes for _, sizes in (epilogues.over_tokens(like[0]), epilogues.over_layers(like[1])))
        for kernel, constants in (
            (epilogues.norm_error_kernel, of_tokens),
            (epilogues.norm_error_backward_kernel, of_tokens),
            (epilogues.gelu_error_kernel, dict(BLOCK=epilogues.BLOCK_ELEMENTS)),
            (epilogues.gelu_error_backward_kernel, dict(BLOCK=epilogues.BLOCK_ELEMENTS)),
            (epilogues.step_kernel, of_layers),
            (epilogues.step_backward_kernel, of_layers),
        ):
            if dim > 32 and "gelu" in kernel.__name__:
                continue
            name = kernel.__name__.removesuffix("_kernel")
            yield Case(name, kernel, (dim, hidden, tokens), "", constants | epilogues.OPTIONS)


SIZES = ((16, 64, 16), (32, 128, 8), (32, 128, 16), (64, 128, 16), (64, 256, 16), (32, 128, 32), (128, 256, 16))
CASES = [
    *(case for sizes in SIZES for case in loops(*sizes, "tf32")),
    *(case for precision in ("tf32x3", "ieee") for sizes in SIZES[2:5] for case in loops(*sizes, precision)),
    *trials(),
    *others(),
]


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """What a kernel needs on a GPU of a compute capability."""
    names = case.kernel.arg_names
    options = {name: value for name, value in (compilation.LAUNCH | case.constants).items() if name not in names}
    fixed = {name: value for name, value in case.constants.items() if name in names} | dict.fromkeys(case.absent)
    types = {name: "constexpr" if name in fixed else "i32" if name in NUMBERS else "*fp32" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] == "*fp32"}
    source = ASTSource(case.kernel, types, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return usage(found.asm["cubin"]) | {"shared": found.metadata.shared, "warps": found.metadata.num_warps}


def usage(machine_code: bytes) -> dict[str, int]:
    """Registers, stack, spills and tensor core instructions of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        resources, instructions = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"no registers in what {tool.name} says: {resources}")
    count = {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        "tensor core instructions": len(re.findall(r"\b(?:HMMA|HGMMA)\b", instructions)),
    }
    return {"registers": int(found[1]), "stack": int(found[2]), **count}


def record_of(case: Case, capability: int) -> dict[str, Any]:
    """A case, and what it needs."""
    about = dict(zip(("dim", "hidden", "tokens"), case.sizes, strict=True))
    chosen = dict(products=case.precision, tile=case.constants.get("T", ""), capability=capability)
    return {"kernel": case.name, **about, **chosen, **compiled(case, capability), "trial": case.is_trial}


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each kernel; what it needs, on one compute capability after the other."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault(tuple(str(record[name]) for name in CHOSEN), []).append(record)
    found = [
        [*chosen, *(" / ".join(str(each[name]) for each in same) for name in FOUND)] for chosen, same in rows.items()
    ]
    return [[*CHOSEN, *FOUND], *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", help="cases whose name has these words in it; nothing is recorded")
    arguments = parser.parse_args()
    records = []
    for case in CASES:
        if arguments.only is not None and arguments.only not in case.name:
            continue
        for capability in ARCHITECTURES:
            records.append(record_of(case, capability))
            print(" | ".join(f"{name} {value}" for name, value in records[-1].items()), flush=True)
    if arguments.only is None:
        write(dict(machine=describe_machine(), triton=triton.__version__, kernels=records))


def write(found: dict[str, Any]) -> None:
    """Record the figures, and set the tables of docs/kernels.md."""
    (RESULTS / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    about = f"Triton {found['triton']}, {found['machine']['date']}, commit {found['machine']['commit']}."
    tables = []
    for title, is_trial in (("What is run:", False), ("What was tried besides:", True)):
        tables += [title, markdown(table([record for record in found["kernels"] if record["trial"] is is_trial]))]
    put(DOCS / "kernels.md", "compiled", "\n\n".join([about, *tables]))


if __name__ == "__main__":
    main()
