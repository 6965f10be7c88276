"""Draw who sees whom in the four Titans models, from the masks that attention uses and how memories are read.

python docs/draw_titans.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from titans_pytorch.attention.masks import context_mask, window_mask

TOKENS, PERSISTENT, WINDOW, CHUNK = 12, 2, 4, 2
HERE = torch.device("cpu")
COLORS = {"unseen": "#f2f2f2", "attention": "#4c72b0", "memory": "#dd8452", "both": "#8c6bb1", "context": "#55a868"}
NAMES = list(COLORS)


def by_attention(sees: str) -> np.ndarray:
    """Who is seen by attention: (token, [persistent | token]), and by way of h, for segments."""
    if sees == "sliding":
        return window_mask(TOKENS, TOKENS, PERSISTENT, WINDOW - 1, True, HERE).numpy()
    seen = np.zeros((TOKENS, PERSISTENT + TOKENS), dtype=bool)
    seen[:, :PERSISTENT] = True
    mask = context_mask(WINDOW, WINDOW, PERSISTENT, HERE).numpy()[:, PERSISTENT + WINDOW :]
    for start in range(0, TOKENS, WINDOW):
        seen[start : start + WINDOW, PERSISTENT + start : PERSISTENT + start + WINDOW] = mask
    return seen


def by_memory(num_before: int) -> np.ndarray:
    """What is in the memory that a token reads: everything up to the last complete chunk, persistent tokens first."""
    seen = np.zeros((TOKENS, PERSISTENT + TOKENS), dtype=bool)
    for token in range(TOKENS):
        complete = (num_before + token + 1) // CHUNK * CHUNK - num_before
        seen[token, : PERSISTENT if num_before else 0] = True
        seen[token, PERSISTENT : PERSISTENT + max(complete, 0)] = True
    return seen


def before_segment() -> np.ndarray:
    """Of MAC: what h knows, the complete chunks before the segment."""
    seen = np.zeros((TOKENS, PERSISTENT + TOKENS), dtype=bool)
    for token in range(TOKENS):
        seen[token, PERSISTENT : PERSISTENT + token // WINDOW * WINDOW // CHUNK * CHUNK] = True
    return seen


def cells(variant: str) -> np.ndarray:
    """-> the index of a colour for each (token, [persistent | token])"""
    nothing = np.zeros((TOKENS, PERSISTENT + TOKENS), dtype=bool)
    attention = {"mac": "segments", "mag": "sliding", "mal": "sliding"}.get(variant)
    seen = nothing if attention is None else by_attention(attention)
    memory = by_memory(0 if variant == "mac" else PERSISTENT)
    context = before_segment() if variant == "mac" else nothing
    image = np.full(seen.shape, NAMES.index("unseen"))
    image[memory] = NAMES.index("memory")
    image[context] = NAMES.index("context")
    image[seen] = NAMES.index("attention")
    image[seen & memory] = NAMES.index("both")
    return image


def draw(variant: str, title: str, path: Path) -> None:
    image = cells(variant)
    _, ax = plt.subplots(figsize=(5.2, 4.3))
    ax.imshow(image, cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=len(NAMES) - 1, aspect="equal")
    ax.set_xticks(range(PERSISTENT + TOKENS), [*(["p"] * PERSISTENT), *map(str, range(1, TOKENS + 1))], fontsize=8)
    ax.set_yticks(range(TOKENS), range(1, TOKENS + 1), fontsize=8)
    ax.set_xticks(np.arange(PERSISTENT + TOKENS + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(TOKENS + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.set(xlabel="what is seen: persistent tokens, tokens", ylabel="token")
    ax.set_title(title, fontsize=11)
    words = {
        "attention": "attention",
        "memory": "memory, after complete chunks",
        "both": "attention and memory",
        "context": "memory: also as context h of attention",
    }
    shown = [name for name in words if NAMES.index(name) in image]
    handles = [Patch(color=COLORS[name], label=words[name]) for name in shown]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize=8, frameon=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()


if __name__ == "__main__":
    folder = Path(__file__).parent / "images"
    sizes = f"window {WINDOW}, chunks of {CHUNK}"
    draw("mac", f"MAC: segments of {WINDOW}, chunks of {CHUNK}", folder / "titans_mac.png")
    draw("mag", f"MAG: {sizes}, side by side", folder / "titans_mag.png")
    draw("mal", f"MAL: {sizes}, one after the other", folder / "titans_mal.png")
    draw("lmm", f"LMM: chunks of {CHUNK}", folder / "titans_lmm.png")
