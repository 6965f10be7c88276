"""What writing at test time is worth to a model on held-out text, as the record of its last validation says it."""

from __future__ import annotations

from typing import Any

ON, ON_BY_POSITION = "valid_bits_per_byte", "by_position"
OFF, OFF_BY_POSITION = "valid_bits_per_byte_writes_off", "by_position_writes_off"


def worth(records: list[dict[str, Any]]) -> str | None:
    """The last validation in a sentence; None where it was not done with writes off, too."""
    last: dict[str, Any] = next((each for each in reversed(records) if ON in each), {})
    if OFF not in last:
        return None
    on, off = last[ON], last[OFF]
    late = slice(-max(len(last[ON_BY_POSITION]) // 4, 1), None)
    gains = [off - on for on, off in zip(last[ON_BY_POSITION][late], last[OFF_BY_POSITION][late], strict=True)]
    return (
        f"held-out text: {on:.3f} bits per byte with what memories write, {off:.3f} with writes off: "
        f"{off - on:+.3f}, in the last quarter of a sequence {sum(gains) / len(gains):+.3f}"
    )
