"""python docs/draw_storing_and_reading.py: the picture of the README, drawn from the schedule the library runs on."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from titans_pytorch.memory.plan import Layout, plan_blocks

TOKENS, CHUNK, BATCH = 18, 4, 8
CALLS = (7, 11)  # the same tokens in two calls
COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"]


def box(
    ax: Axes, x: float, y: float, width: float, color: str, text: str, *, height: float = 0.6, alpha: float = 1.0
) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5, alpha=alpha))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color="white")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.1))


def draw(path: Path) -> None:
    layout = Layout(CHUNK, CHUNK, BATCH)
    blocks = plan_blocks(layout, 1, TOKENS, 0, max_chunks=1)
    _, ax = plt.subplots(figsize=(11, 4.4))
    for token in range(1, TOKENS + 1):
        read = layout.weight_index(token // CHUNK)
        is_waiting = token > TOKENS // CHUNK * CHUNK
        box(ax, token - 0.46, 3.0, 0.92, "#999999" if is_waiting else COLORS[(token - 1) // CHUNK], str(token))
        box(ax, token - 0.46, 0.0, 0.92, COLORS[read - 1] if read else "#333333", f"$w_{read}$", alpha=0.85)
        arrow(ax, (token, 0.98), (token, 0.64), COLORS[read - 1] if read else "#333333")
    for block in blocks:
        if block.num_chunks:
            number = block.first_chunk + 1
            end = number * CHUNK
            box(
                ax,
                end - CHUNK + 0.54,
                2.0,
                CHUNK - 0.08,
                COLORS[number - 1],
                f"surprise of chunk {number}",
                height=0.5,
            )
            for token in range(end - CHUNK + 1, end + 1):
                arrow(ax, (token, 2.98), (token, 2.53), COLORS[number - 1])
            box(ax, end - 0.46, 1.0, 0.92, COLORS[number - 1], f"$w_{number}$", height=0.5)
            arrow(ax, (end, 1.98), (end, 1.53), COLORS[number - 1])
        if block.renews_base:
            border = (block.first_chunk + block.num_chunks) * CHUNK + 0.5
            ax.plot([border, border], [-0.1, 3.7], color="black", linestyle=":", linewidth=1.2)
            ax.text(border, 3.8, "base $\\leftarrow$ w", ha="center", fontsize=9)
    box(ax, 0.54 - 1.2, 1.0, 1.15, "#333333", "$w_0$", height=0.5)
    first = CALLS[0] + 0.5
    ax.plot([first, first], [2.9, 3.7], color="#d62728", linewidth=2.5)
    ax.text(
        first,
        -0.45,
        "a call may end anywhere: the state keeps the tokens of its unfinished chunk",
        color="#d62728",
        ha="center",
        fontsize=9,
    )
    for y, text in (
        (3.3, "tokens"),
        (2.25, "stored"),
        (1.25, "memory: learned start,\nthen after each chunk"),
        (0.3, "read by\nthe token above"),
    ):
        ax.text(-0.9, y, text, ha="right", va="center", fontsize=10)
    ax.text(TOKENS - 0.5, 2.25, "waiting", ha="center", va="center", fontsize=9, color="#777777")
    ax.set(xlim=(-4.2, TOKENS + 0.7), ylim=(-0.7, 4.1))
    ax.axis("off")
    plt.tight_layout()
    plt.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "storing_and_reading.png")
