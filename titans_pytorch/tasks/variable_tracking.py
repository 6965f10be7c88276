"""Variable tracking, as RULER defines it (arXiv 2404.06654): which variables have a value, through assignments."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from titans_pytorch.tasks import words
from titans_pytorch.tasks.hidden import HiddenInText, Written
from titans_pytorch.tasks.task import check_range


@dataclass(frozen=True)
class VariableTracking(HiddenInText):
    """`VAR A = 12345`, `VAR B = VAR A`, ...: all variables with one value are asked for, in the order of the text.

    chains: values that are assigned; hops: variables of a chain after the first
    """

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("chains", self.chains, 1, words.MOST)
        check_range("hops", self.hops, 0, words.MOST)

    def write(self, drawn: random.Random) -> Written:
        count = self.hops + 1
        names = words.different(self.chains * count, draw_name, drawn)
        values = words.different(self.chains, lambda each: words.number(each, 5), drawn)
        hidden = []
        for chain, value in enumerate(values):
            own, source = names[chain * count : (chain + 1) * count], value
            for depth, name in zip(sorted(drawn.random() for _ in own), own, strict=True):
                hidden.append((depth, f"VAR {name} = {source}"))
                source = f"VAR {name}"
        question = (
            f"Question: Find all variables that are assigned the value {values[0]} in the text above. "
            f"Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
            f"assigned the value {values[0]}, they are:"
        )
        told: list[tuple[str, bool]] = [(question, False)]
        for name in names[:count]:
            told += [(" ", False), (name, True)]
        before = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        return Written(before, hidden, told)


def draw_name(drawn: random.Random) -> str:
    return "".join(drawn.choices(string.ascii_uppercase, k=5))
