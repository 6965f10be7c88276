"""Two processes that train together, with no parameter unused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.support.mac_configurations import NUM_TOKENS, build


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = build(neural_mem_weight_residual=True, neural_memory_qkv_receives_diff_views=True, batches=1)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):  # the second step complains about parameters that the first left out
        parallel(torch.randint(0, NUM_TOKENS, (1, 13), generator=generator), return_loss=True).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_averaged_over_processes(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
