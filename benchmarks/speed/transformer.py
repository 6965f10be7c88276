"""The transformer's training step and decoding, beside the published package if its interpreter is given.

    python -m benchmarks.speed.transformer --peer PYTHON       # of an environment with titans-pytorch 0.5.5
    python -m benchmarks.speed.transformer --only readme       # one workload, this library only

Every measurement runs in a process of its own. Results go to results/transformer.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import CHECKOUT, DOCS, describe_machine
from benchmarks.pages import put
from benchmarks.speed.measure import Process, Side

WORKER = Path(__file__).with_name("transformer_worker.py")
RESULTS = machine.RESULTS / "transformer.json"

TRAIN_MAC: dict[str, Any] = dict(
    num_tokens=256,
    dim=384,
    depth=8,
    segment_len=32,
    num_persist_mem_tokens=4,
    num_longterm_mem_tokens=4,
    neural_memory_layers=(2, 4, 6),
    neural_memory_segment_len=4,
    neural_memory_batch_size=128,
    neural_mem_weight_residual=True,
    neural_memory_qkv_receives_diff_views=True,
    sliding_window_attn=True,
    neural_memory_model=["MemoryMLP", dict(dim=64, depth=2)],
)
MEMORY: dict[str, Any] = dict(
    dim_head=64,
    heads=4,
    attn_pool_chunks=True,
    qk_rmsnorm=True,
    momentum=True,
    momentum_order=1,
    default_step_transform_max_lr=0.1,
    per_parameter_lr_modulation=True,
)
README: dict[str, Any] = dict(
    num_tokens=256,
    dim=256,
    depth=2,
    segment_len=128,
    num_persist_mem_tokens=4,
    num_longterm_mem_tokens=16,
)
CONTEXTS = [1_000, 4_000, 16_000, 50_000, 100_000]
WORKLOADS: dict[str, dict[str, Any]] = {
    "readme": dict(kwargs=README, batch=1, tokens=1023, contexts=CONTEXTS),
    "train_mac": dict(
        kwargs=TRAIN_MAC | dict(neural_memory_kwargs=MEMORY | dict(spectral_norm_surprises=True)),
        batch=4,
        tokens=512,
        contexts=CONTEXTS,
    ),
    "train_mac, no spectral norm": dict(
        kwargs=TRAIN_MAC | dict(neural_memory_kwargs=MEMORY | dict(spectral_norm_surprises=False)),
        batch=4,
        tokens=512,
        contexts=CONTEXTS,
    ),
}


def measure(
    python: str, measurement: str, workload: dict[str, Any], repeats: int, checkout: Path | None
) -> dict[str, Any]:
    command = [python, "-I", str(WORKER), measurement, json.dumps(workload), "--repeats", str(repeats)]
    command += ["--checkout", str(checkout)] if checkout else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def stepper(side: Side, workload: dict[str, Any]) -> Process:
    """Trains a workload's transformer a step at a time: every answer has the seconds of one."""
    return Process(side, WORKER, "on_request", json.dumps(workload))


def compare(name: str, peer: str | None) -> dict[str, Any]:
    """All measurements of one workload."""
    workload, found = WORKLOADS[name], {}
    repeats = 3 if name == "readme" else 1  # of the published package, which takes long
    for measurement in ("training", "sampling"):
        found[measurement] = measure(sys.executable, measurement, workload, 3, CHECKOUT)
        if peer is not None:
            found[f"peer {measurement}"] = measure(peer, measurement, workload, repeats, None)
    for measurement in ("products", "compiled"):
        found[measurement] = measure(sys.executable, measurement, workload, 3, CHECKOUT)
    found["peer compiled"] = found.get("peer sampling", {})  # nothing of theirs compiles a step
    found["decoding"] = measure(sys.executable, "decoding", workload, 1, CHECKOUT)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| workload | measurement | published | here | ratio |", "|---|---|---|---|---|"]
    for name, found in results.items():
        for measurement, key, what, scale, unit in (
            ("training", "seconds", "a training step", 1.0, "s"),
            ("products", "seconds", "its products alone", 1.0, "s"),
            ("training", "peak_bytes", "its peak memory", 1e-6, "MB"),
            ("sampling", "ms_per_token", "sampling, per token", 1.0, "ms"),
            ("compiled", "ms_per_token", "sampling with compiled steps", 1.0, "ms"),
        ):
            ours, theirs = found[measurement].get(key), found.get(f"peer {measurement}", {}).get(key)
            ratio = f"{theirs / ours:.1f}×" if ours and theirs else "—"
            cells = [f"{readable(scale * x)} {unit}" if x else "—" for x in (theirs, ours)]
            lines.append(f"| {name} | {what} | {cells[0]} | {cells[1]} | {ratio} |")
        for row in found["decoding"].get("rows", []):
            ours = f"{row['ms_per_token']:.2f} ms, {row['peak_bytes'] / 1e6:,.0f} MB"
            lines.append(f"| {name} | one token after {row['context']:,} | — | {ours} | — |")
    return "\n".join(lines)


def readable(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the interpreter of an environment with titans-pytorch 0.5.5")
    parser.add_argument("--only", choices=list(WORKLOADS))
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(WORKLOADS)
    where = describe_machine()
    results = {name: compare(name, arguments.peer) for name in names}
    print(table(results))
    if not arguments.only:
        RESULTS.write_text(json.dumps({"machine": where, "workloads": results}, indent=2) + "\n")
        about = f"{where['cpu']}, 2 threads, {where['date']}, commit {where['commit']}."
        put(DOCS / "benchmarks.md", "transformer", f"{about}\n\n{table(results)}")


if __name__ == "__main__":
    main()
