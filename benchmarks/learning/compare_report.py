"""Tables and pictures of a comparison: `python -m benchmarks.learning.compare report RESULTS.jsonl --to FOLDER`.

Writes report.md, and where there is something to draw recovery.png, by_position.png, by_distance.png and one map of
needles for each model. A cell that was not measured stays empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning.compare import existing
from benchmarks.learning.protocol import CEILING, FLOOR, FROZEN, Evaluation, recovery
from benchmarks.machine import place
from benchmarks.pages import markdown
from benchmarks.records import Record
from titans_pytorch.training.errors import SettingsError, report_errors

Group = dict[str, list[Record]]
"""Records of one comparison and one budget, by model, each with a line for every seed; writes off is a model too"""

COLORS = ("#c44e52", "#dd8452", "#8172b3", "#4c72b0", "#55a868", "#937860")
BITS, OFF = "bits per byte", "writes off"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="as compare has written them")
    parser.add_argument("--to", type=Path, help="folder; default: beside the results")
    given = parser.parse_args(arguments)
    return report_errors(lambda: report(given.results, given.to or given.results.with_suffix(".report")))


def report(results: Path, folder: Path) -> int:
    records = existing(results)
    if not records:
        raise SettingsError(f"{results} must hold results of a comparison, got none")
    folder.mkdir(parents=True, exist_ok=True)
    page = []
    for name, group in grouped(records).items():
        check_alike(name, group)
        page += [f"## {name}", about(group), scores(group), *versions(group)]
        page += [table for kind in ("by_position", "by_distance") if (table := bits(group, kind))]
        page += [f"![{path.stem}]({path.name})" for path in pictures(group, folder, name)]
    (folder / "report.md").write_text("\n\n".join(page) + "\n")
    print(*sorted(folder.iterdir()), sep="\n")
    return 0


def check_alike(name: str, group: Group) -> None:
    """Refuse to take a mean over runs that differ in more than their seeds; a price on storing is of memories alone."""
    records = [record for records in group.values() for record in records]
    for part in ("task", "train", "evaluation", "turns"):
        if any(of_all(record, part) != of_all(records[0], part) for record in records):
            raise SettingsError(
                f"results of {name} must be of one {part}, got several: report them from files of their own"
            )
    for model, of_seeds in group.items():
        for part in ("model", "train"):
            if any(record["settings"][part] != of_seeds[0]["settings"][part] for record in of_seeds):
                raise SettingsError(f"results of {name} must be of one {model}, got several settings under that name")


def of_all(record: Record, part: str) -> Any:
    """Settings that all models of a comparison share; an option that is younger than a record has its default."""
    settings = record["settings"].get(part)
    if part == "evaluation":
        return json.loads(json.dumps(asdict(Evaluation()))) | settings
    return {key: value for key, value in settings.items() if key != "step_cost"} if part == "train" else settings


def grouped(records: list[Record]) -> dict[str, Group]:
    """By comparison and budget, which decide what may be compared."""
    found: dict[str, Group] = {}
    for record in records:
        (kind, amount), *_ = record["budget"].items()
        models = found.setdefault(f"{record['comparison']}, {amount:g} {kind}", {})
        models.setdefault(record["model"], []).append(record)
        if record["writes_off"] is not None:
            off = record | dict(results=record["writes_off"], role=OFF, writes_off=None)
            off |= dict(versions=record.get("versions_writes_off"))
            models.setdefault(f"{record['model']}, {OFF}", []).append(off)
    return {name: in_order(group) for name, group in found.items()}


def in_order(group: Group) -> Group:
    """Models with memory first, each before the same with writes off, then what they are held against."""
    places = {role: place for place, role in enumerate(("memory", OFF, FROZEN, FLOOR, CEILING))}
    return dict(sorted(group.items(), key=lambda each: places.get(each[1][0]["role"], len(places))))


def about(group: Group) -> str:
    """What was trained where, by which commit: enough to do it again."""
    all_records = [record for records in group.values() for record in records]
    places = sorted({place(record) for record in all_records})
    task, train = all_records[0]["settings"]["task"], all_records[0]["settings"]["train"]
    told = "; ".join(f"{name} {value}" for name, value in {**task, **train}.items() if name != "name")
    turns = all_records[0]["settings"].get("turns", ())
    told += "".join(f"; in turn with {', '.join(f'{name} {value}' for name, value in turn.items())}" for turn in turns)
    return f"Task `{task['name']}` ({told}). Metric: {all_records[0]['metric']}. Measured on {'; '.join(places)}."


def scores(group: Group) -> str:
    """A line for each model: mean and range over seeds at every length, and recovery where there is a ceiling."""
    lengths = lengths_of(group)
    head = ["model", "parameters", "seeds", "steps", "seconds", *lengths]
    recovered = {length: recoveries(group, length) for length in lengths}
    shown = [length for length in lengths if any(value is not None for value in recovered[length].values())]
    rows = [[*head, *(f"recovery at {length}" for length in shown)]]
    for model, records in group.items():
        cells = [model, f"{records[0]['parameters']:,}", str(len(records))]
        cells += [spread([record[name] for record in records], "{:,.0f}") for name in ("steps", "seconds")]
        cells += [spread(of_seeds(records, length), "{:.3f}") for length in lengths]
        rows.append([*cells, *(share(recovered[length].get(model)) for length in shown)])
    return markdown(rows)


def versions(group: Group) -> list[str]:
    """Every model at every version of the task that is asked beside the trained one, the longer list down, if any."""
    names = ordered(name for records in group.values() for record in records for name in record.get("versions") or {})
    if not names:
        return []
    rows = [["asked, not trained on", *names], ["sequences a seed", *(sequences(group, name) for name in names)]]
    for model, records in group.items():
        found = [[r["versions"][name]["score"] for r in records if name in (r.get("versions") or {})] for name in names]
        rows.append([model, *(spread(values, "{:.3f}") for values in found)])
    if len(names) > len(group):
        rows = [list(column) for column in zip(*rows, strict=True)]
    return [markdown(rows)]


def sequences(group: Group, name: str) -> str:
    """How many sequences of a version every seed was asked."""
    counts = {
        r["versions"][name]["rows"] for records in group.values() for r in records if name in (r.get("versions") or {})
    }
    return " or ".join(map(str, sorted(counts)))


def lengths_of(group: Group) -> list[str]:
    found = {length for records in group.values() for record in records for length in record["results"]}
    return sorted(found, key=int)


def of_seeds(records: list[Record], length: str, *path: str) -> list[float]:
    """The numbers of all seeds at a length; what is missing is left out."""
    found = []
    for record in records:
        value: Any = record["results"].get(length, {})
        for name in path or ("score",):
            value = value.get(name, {}) if isinstance(value, dict) else {}
        if isinstance(value, list):
            value = value[0]
        if isinstance(value, (int, float)):
            found.append(float(value))
    return found


def spread(values: list[float], form: str) -> str:
    """Mean and range; empty where nothing was measured."""
    if not values:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    middle = form.format(mean(values))
    return middle if low == high else f"{middle} ({low}–{high})"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def recoveries(group: Group, length: str) -> dict[str, float | None]:
    """The recovery of every model at a length, of the means over seeds.

    Empty where floor or ceiling is missing, or where it is no ceiling: in its worst seed not above the best floor.
    """
    sign = -1 if next(iter(group.values()))[0]["metric"] == BITS else 1
    scores = {model: [sign * value for value in of_seeds(records, length)] for model, records in group.items()}
    floor, ceiling = scores.get(FLOOR), scores.get(CEILING)
    if not floor or not ceiling or min(ceiling) <= max(floor):
        return {}
    return {model: recovery(mean(each), mean(floor), mean(ceiling)) for model, each in scores.items() if each}


def bits(group: Group, kind: str) -> str:
    """Bits per byte by position or by distance, at the trained length; "" where it is no text."""
    length = lengths_of(group)[0]
    names = ordered(name for records in group.values() for r in records for name in r["results"][length].get(kind, {}))
    if not names:
        return ""
    title = {"by_position": "position", "by_distance": "identifier last seen"}[kind]
    rows = [[f"bits by {title}, of {length}", *names, *(["shuffled control"] if kind == "by_position" else [])]]
    for model, records in group.items():
        cells = [spread(of_seeds(records, length, kind, name), "{:.3f}") for name in names]
        control = [spread(of_seeds(records, length, "shuffled"), "{:.3f}")] if kind == "by_position" else []
        rows.append([model, *cells, *control])
    return markdown(rows)


def ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


# ---- pictures


def pictures(group: Group, folder: Path, name: str) -> list[Path]:
    """All that can be drawn of a group."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in name)
    kinds: dict[str, Callable[[Group, Path], Path | None]] = dict(
        recovery=draw_recovery, by_position=draw_position, by_distance=draw_distance, needles=draw_needles
    )
    found = (draw(group, folder / f"{stem}-{kind}.png") for kind, draw in kinds.items())
    return [path for path in found if path is not None]


def panels(count: int, height: float = 4.0) -> tuple[Any, list[Any]]:
    from titans_pytorch.training.pictures import figure

    fig = figure(max(5.5 * count, 7.0), height)
    axes = fig.subplots(1, count, squeeze=False)[0]
    return fig, list(axes)


def drawn(fig: Any, path: Path) -> Path:
    from titans_pytorch.training.pictures import write

    return write(fig, path)


def draw_recovery(group: Group, path: Path) -> Path | None:
    """A bar for each model and length."""
    lengths = lengths_of(group)
    found = {length: {m: v for m, v in recoveries(group, length).items() if v is not None} for length in lengths}
    models = [model for model in group if any(model in found[length] for length in lengths)]
    if not models:
        return None
    fig, (ax,) = panels(1)
    for number, model in enumerate(models):
        places = [place + number * 0.8 / len(models) for place in range(len(lengths))]
        heights = [found[length].get(model, float("nan")) for length in lengths]
        ax.bar(places, heights, width=0.75 / len(models), color=COLORS[number % len(COLORS)], label=model)
    ax.set_xticks([place + 0.35 for place in range(len(lengths))], lengths)
    ax.set(xlabel="tokens", ylabel="recovery (floor 0, ceiling 1)")
    ax.legend(frameon=False)
    return drawn(fig, path)


def draw_position(group: Group, path: Path) -> Path | None:
    return draw_bits(group, "by_position", "position in the context", path)


def draw_distance(group: Group, path: Path) -> Path | None:
    return draw_bits(group, "by_distance", "identifier last seen", path)


def draw_bits(group: Group, kind: str, label: str, path: Path) -> Path | None:
    """Bits per byte, a panel for each length."""
    lengths = [length for length in lengths_of(group) if any(of_kind(group, length, kind))]
    if not lengths:
        return None
    fig, axes = panels(len(lengths))
    for ax, length in zip(axes, lengths, strict=True):
        names = ordered(of_kind(group, length, kind))
        for number, (model, records) in enumerate(group.items()):
            found = [of_seeds(records, length, kind, name) for name in names]
            points = [(place, mean(values)) for place, values in enumerate(found) if values]
            style = dict(color=COLORS[number % len(COLORS)], label=model, marker="o", markersize=3)
            ax.plot([place for place, _ in points], [value for _, value in points], **style)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        ax.set(xlabel=label, ylabel=BITS, title=f"contexts of {int(length):,}")
        ax.grid(alpha=0.25)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(group), frameon=False)
    return drawn(fig, path)


def of_kind(group: Group, length: str, kind: str) -> list[str]:
    records = [record for records in group.values() for record in records]
    return [name for record in records for name in record["results"].get(length, {}).get(kind, {})]


def draw_needles(group: Group, path: Path) -> Path | None:
    """A map for each model: how often a needle is found, by length and depth."""
    lengths = [length for length in lengths_of(group) if of_kind(group, length, "by_depth")]
    if not lengths:
        return None
    depths = ordered(of_kind(group, lengths[0], "by_depth"))
    fig, axes = panels(len(group))
    for ax, (model, records) in zip(axes, group.items(), strict=True):
        cells = [[of_seeds(records, length, "by_depth", depth) for length in lengths] for depth in depths]
        heights = [[mean(values) if values else float("nan") for values in row] for row in cells]
        image = ax.imshow(heights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(lengths)), lengths, fontsize=8)
        ax.set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths], fontsize=7)
        ax.set(xlabel="tokens", ylabel="depth", title=model)
        fig.colorbar(image, ax=ax)
    return drawn(fig, path)


if __name__ == "__main__":
    raise SystemExit(main())
