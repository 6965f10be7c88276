"""Words for keys: an adjective and a noun make one of 3,600."""

from __future__ import annotations

import random
from collections.abc import Callable

ADJECTIVES = """able ample bitter blue bold brave brief bright calm clean clever cold cosy crisp curly damp deep dull
eager early fair faint fancy fast firm flat fresh gentle glad grand green happy hasty heavy honest humble icy jolly keen
kind late lean light loud lucky mellow mild neat noble odd pale plain proud quick quiet rapid rough shy""".split()  # noqa: SIM905
NOUNS = """anchor apple arrow badge banjo barrel basket beacon bell blanket boat bottle bridge brush bucket button cabin
candle canyon carpet castle cello chair cherry cliff clock cloud coin comet compass crane desert drum engine falcon
feather fence fiddle flute forest fossil garden glacier guitar hammer harbor helmet island jacket kettle ladder lantern
lemon marble meadow mirror needle orchard paddle pebble""".split()  # noqa: SIM905


MOST = 1000
"""Different ones at most: they are drawn until there are enough, which would not end near as many as exist"""


def key(drawn: random.Random) -> str:
    """A word that is easy to tell from others: adjective-noun."""
    return f"{drawn.choice(ADJECTIVES)}-{drawn.choice(NOUNS)}"


def number(drawn: random.Random, digits: int) -> str:
    """A number of so many digits, the first of which is not 0."""
    return str(drawn.randrange(10 ** (digits - 1), 10**digits))


def uuid(drawn: random.Random) -> str:
    """32 hexadecimal digits in five groups, with the marks of version 4."""
    digits = f"{drawn.getrandbits(128):032x}"
    digits = f"{digits[:12]}4{digits[13:16]}{'89ab'[int(digits[16], 16) % 4]}{digits[17:]}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def different(count: int, draw: Callable[[random.Random], str], drawn: random.Random) -> list[str]:
    """So many different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(drawn)] = None
    return list(found)
