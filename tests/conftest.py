"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """Commands that are run in a test set torch's threads, by which the last digits of later tests would depend."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
