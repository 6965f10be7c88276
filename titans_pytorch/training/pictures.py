"""Pictures of a run: how the loss went, where a text surprised the model and its memory, what writing saved on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titans_pytorch.training.errors import SettingsError, needed
from titans_pytorch.training.files import writing
from titans_pytorch.training.runs import Run
from titans_pytorch.training.surprise import TextSurprise, text_surprise
from titans_pytorch.training.worth import OFF_BY_POSITION

CURVES, SURPRISE, SAVED = "curves.png", "surprise.png", "saved.png"
TRAIN, VALID, OFF = "#9db4d3", "#c44e52", "#8172b3"
LONGEST = 1024  # bytes of text in a picture
COLUMNS = 64


def draw(run: Run, text: bytes | None = None) -> list[Path]:
    """All pictures, of everything logged so far and of the best checkpoint."""
    paths = [draw_curves(run)]
    model, _ = run.model()
    shown, kind = (run.text() if text is None else text)[:LONGEST], run.text_kind()
    ids = kind.encode(shown)
    if len(ids) < 2:
        raise SettingsError(f"a text to be drawn must have at least 2 {kind.unit}s, got {len(ids)}")
    lengths = torch.tensor([len(piece) for piece in kind.pieces(ids)])
    surprise = text_surprise(model, ids)
    memory, saved, drawn = surprise.memory, surprise.saved, b"".join(kind.pieces(ids))
    by_byte = TextSurprise(
        (surprise.bits / lengths).repeat_interleave(lengths),  # a token's bits, shared out
        None if memory is None else memory.repeat_interleave(lengths),
        None if saved is None else (saved / lengths).repeat_interleave(lengths),
    )
    paths.append(draw_surprise(run.folder / SURPRISE, drawn, by_byte))
    if by_byte.saved is not None:
        paths.append(draw_saved(run.folder / SAVED, drawn, by_byte.saved))
    return paths


def figure(width: float, height: float) -> Any:
    """Without pyplot, which would look for a screen."""
    needed("matplotlib", "drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(made)
    return made


def write(fig: Any, path: Path) -> Path:
    with writing(path) as temporary:
        fig.savefig(temporary, format="png")
    return path


# ---- curves


def draw_curves(run: Run) -> Path:
    """Bits per byte over steps, and over the position in the context."""
    settings, records = run.config()["training"], run.metrics()
    sequence = settings["sequence"] * settings.get("carry", 1)
    steps = [each for each in records if "bits_per_byte" in each]
    valid = [each for each in records if "valid_bits_per_byte" in each]
    if not steps:
        raise SettingsError(f"{run.folder} has no metrics to draw yet")
    fig = figure(11, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    x, y = [each["step"] for each in steps], np.array([each["bits_per_byte"] for each in steps])
    left.plot(x, y, color=TRAIN, linewidth=0.8, label="training, each step")
    left.plot(x, smoothed(y), color="#4c72b0", linewidth=1.6, label="training, running mean")
    if valid:
        points = [each["step"] for each in valid], [each["valid_bits_per_byte"] for each in valid]
        left.plot(*points, color=VALID, marker="o", markersize=3.5, linewidth=1.4, label="validation")
        left.set_title(f"best validation: {min(points[1]):.3f} bits per byte", fontsize=10)
        by_position(right, sequence, valid)
    left.set(xlabel="step", ylabel="bits per byte", ylim=(max(0, y.min() * 0.9), min(y.max(), 9) * 1.02))
    left.legend(frameon=False)
    left.grid(alpha=0.25)
    return write(fig, run.folder / CURVES)


def by_position(ax: Any, sequence: int, valid: list[dict[str, Any]]) -> None:
    lines = [
        (valid[0]["by_position"], "#bbbbbb", "first validation"),
        (valid[-1]["by_position"], VALID, "last validation"),
        (valid[-1].get(OFF_BY_POSITION), OFF, "last, writes off"),
    ]
    for heights, color, name in lines:
        if heights is not None:
            middles = (np.arange(len(heights)) + 0.5) * sequence / len(heights)
            ax.plot(middles, heights, color=color, marker="o", markersize=3, label=name)
    ax.set(xlabel="position in the context", ylabel="bits per byte")
    ax.set_title("by position in the context", fontsize=10)
    ax.legend(frameon=False)
    ax.grid(alpha=0.25)


def smoothed(y: Any) -> Any:
    """Exponential mean over about a twentieth of the steps, unbiased at the start."""
    keep, mean, out = 1 - 1 / max(len(y) / 20, 1), 0.0, []
    for i, value in enumerate(y, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**i))
    return np.array(out)


# ---- a text


def draw_surprise(path: Path, text: bytes, surprise: TextSurprise) -> Path:
    """The text twice: coloured by the model's surprise at every byte, and by the memories'."""
    panels: list[tuple[Any, str, str]] = [(surprise.bits, "bits the model needed for each byte", "bits")]
    if surprise.memory is not None:
        panels.append((surprise.memory, "loss of the memories when each byte was stored (1: their mean)", "times mean"))
    num_rows = -(-len(text) // COLUMNS)
    fig = figure(12, len(panels) * (0.8 + 0.26 * num_rows))
    for ax, (values, title, unit) in zip(fig.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        heat(fig, ax, text, values.numpy(), title, unit)
    return write(fig, path)


def draw_saved(path: Path, text: bytes, saved: Tensor) -> Path:
    """The text once: green where the model needs fewer bits for a byte because its memories write, red where more."""
    fig = figure(12, 0.9 + 0.26 * -(-len(text) // COLUMNS))
    title = f"bits that writing at test time saves on each byte: {float(saved.nansum()):+.0f} of them in this text"
    heat(fig, fig.subplots(), text, saved.numpy(), title, "bits", cmap="RdYlGn", has_sign=True)
    return write(fig, path)


def heat(
    fig: Any, ax: Any, text: bytes, values: Any, title: str, unit: str, cmap: str = "YlOrRd", has_sign: bool = False
) -> None:
    """A text in rows, every byte on its value's colour.  has_sign: zero lies in the middle of the colours"""
    num_rows = -(-len(text) // COLUMNS)
    cells = np.full(num_rows * COLUMNS, np.nan)
    cells[: len(values)] = values
    high = np.nanquantile(np.abs(values), 0.98) if np.isfinite(values).any() else 1.0
    low = -high if has_sign else 0
    image = ax.imshow(
        cells.reshape(num_rows, COLUMNS), cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    for i, byte in enumerate(text):
        is_dark = np.isfinite(values[i]) and (abs(values[i]) > 0.8 * high if has_sign else values[i] > 0.6 * high)
        color = "white" if is_dark else "#222222"
        ax.text(
            *(i % COLUMNS, i // COLUMNS, printable(byte)),
            **dict(ha="center", va="center", fontsize=9, family="monospace", color=color, parse_math=False),
        )
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10, loc="left")
    fig.colorbar(image, ax=ax, label=unit, pad=0.01, extend="both" if has_sign else "max")


def printable(byte: int) -> str:
    return {10: "↵", 9: "→", 32: " "}.get(byte, chr(byte) if 32 < byte < 127 else "·")
