"""What a state has to survive: files, other batches, and being reset in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from titans_pytorch import NeuralMemory, load_state, save_state

EXACT = dict(rtol=1e-9, atol=1e-9)


def check_kept(memory: NeuralMemory, x: Tensor, after: Tensor, folder: Path) -> None:
    """A stream of three rows goes on as if its state had never been saved, taken apart or reset in one row."""
    state = memory(x)[1]
    expected = memory(after, state=state)[0]
    save_state(state, folder / "state", memory)
    loaded: Any = load_state(folder / "state", model=memory)
    assert_close(memory(after, state=loaded)[0], expected, **EXACT)
    rows = [state.select([row]) for row in (2, 0)]
    assert_close(memory(after[[2, 0]], state=rows[0].join(rows))[0], expected[[2, 0]], **EXACT)
    forgotten = memory.reset(state, torch.tensor([False, True, False]))
    assert_close(memory(after, state=forgotten)[0][[0, 2]], expected[[0, 2]], **EXACT)
    nothing = memory(torch.zeros_like(x), store_mask=torch.zeros(x.shape[:2], dtype=torch.bool))[1]
    zeros = memory.reset(nothing, torch.ones(3, dtype=torch.bool))
    assert_close(memory(after, state=forgotten)[0][1], memory(after, state=zeros)[0][1], **EXACT)
