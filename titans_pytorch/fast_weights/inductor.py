"""What inductor, the compiler behind `torch.compile`, is told to do otherwise than by itself."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"cpp_wrapper": True}}
"""By kind of device. On a CPU what calls kernels is compiled, too: of small kernels calling is a large part"""
