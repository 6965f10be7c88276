"""Stories of bAbI (arXiv 1502.05698): the first five tasks by our own simulator, or all from the original files."""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
ACTORS, GIVERS = ("Mary", "John", "Daniel", "Sandra"), ("Fred", "Jeff", "Bill", "Mary")
MOVED = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TOOK = ("picked up", "grabbed", "got", "took")
LEFT = ("dropped", "put down", "left", "discarded")
GAVE = ("gave", "passed", "handed")
OPPOSITE = dict(north="south", south="north", east="west", west="east")

THERE = ("", " there")
FACTS = {1: (2, 10, 4.0), 2: (2, 88, 13.0), 3: (4, 228, 46.0), 5: (2, 126, 17.0)}
"""Facts of a story, by task: at least, at most, and how many more than the least on average, as originals have them"""

LABELS = {1: PLACES, 2: PLACES, 3: PLACES, 4: PLACES, 5: (*GIVERS, *OBJECTS)}
"""What may be answered, by task"""


class Story(NamedTuple):
    """Facts in their order, and a question about them."""

    facts: list[str]
    question: str
    answer: str


class World:
    """Who is where and has what; what happens is told in `facts`."""

    def __init__(self, actors: tuple[str, ...], drawn: random.Random) -> None:
        self.actors, self.drawn, self.facts = actors, drawn, list[str]()
        self.place: dict[str, str] = {}  # of an actor
        self.holder: dict[str, str] = {}  # of an object
        self.visited: dict[str, list[str]] = {}  # places an object has been at, one after the other
        self.given: list[tuple[str, str, str]] = []  # giver, object, receiver

    def somebody(self) -> str:
        return self.drawn.choice(self.actors)

    def move(self) -> None:
        """Somebody goes somewhere else, and what they hold with them."""
        who = self.somebody()
        where = self.drawn.choice([place for place in PLACES if place != self.place.get(who)])
        self.place[who] = where
        self.facts.append(f"{who} {self.drawn.choice(MOVED)} the {where}.")
        for what, holder in self.holder.items():
            if holder == who:
                self.visited[what].append(where)

    def take(self) -> None:
        """Somebody takes what lies where they are, or what nobody has seen yet."""
        who, what = self.somebody(), self.drawn.choice(OBJECTS)
        seen = self.visited.get(what)
        if what in self.holder or who not in self.place or (seen and seen[-1] != self.place[who]):
            return
        self.holder[what] = who
        self.visited.setdefault(what, [self.place[who]])
        self.facts.append(f"{who} {self.drawn.choice(TOOK)} the {what}{self.drawn.choice(THERE)}.")

    def leave(self) -> None:
        """Somebody puts down what they hold."""
        if self.holder:
            what = self.drawn.choice(list(self.holder))
            self.facts.append(
                f"{self.holder.pop(what)} {self.drawn.choice(LEFT)} the {what}{self.drawn.choice(THERE)}."
            )

    def give(self) -> None:
        """Somebody gives what they hold to somebody else, who comes for it."""
        if self.holder:
            what = self.drawn.choice(list(self.holder))
            giver = self.holder[what]
            receiver = self.drawn.choice([each for each in self.actors if each != giver])
            self.holder[what], self.place[receiver] = receiver, self.place[giver]
            self.given.append((giver, what, receiver))
            self.facts.append(f"{giver} {self.drawn.choice(GAVE)} the {what} to {receiver}.")

    def live(self, happenings: list[Callable[[], None]], count: int, is_enough: Callable[[], bool]) -> None:
        """So many facts at least, until a question can be asked."""
        while len(self.facts) < count or not is_enough():
            self.drawn.choice(happenings)()


def simulate(task: int, drawn: random.Random) -> Story:
    """A story of task 1 to 5, with as many facts as the original ones, one to three of which matter."""
    return {1: one_fact, 2: two_facts, 3: three_facts, 4: two_arguments, 5: three_arguments}[task](drawn)


def num_facts(task: int, drawn: random.Random) -> int:
    """Many stories are short, a few are long."""
    least, most, more = FACTS[task]
    return min(least + round(drawn.expovariate(1 / more)), most)


def one_fact(drawn: random.Random) -> Story:
    world = World(ACTORS, drawn)
    world.live([world.move], num_facts(1, drawn), lambda: True)
    who = drawn.choice(list(world.place))
    return Story(world.facts, f"Where is {who}?", world.place[who])


def two_facts(drawn: random.Random) -> Story:
    world = World(ACTORS, drawn)
    world.live([world.move, world.take, world.leave], num_facts(2, drawn), lambda: bool(world.visited))
    what = drawn.choice(list(world.visited))
    return Story(world.facts, f"Where is the {what}?", world.visited[what][-1])


def three_facts(drawn: random.Random) -> Story:
    world = World(ACTORS, drawn)

    def travelled() -> list[str]:
        return [what for what, places in world.visited.items() if len(places) > 1]

    world.live([world.move, world.take, world.leave], num_facts(3, drawn), lambda: bool(travelled()))
    what = drawn.choice(travelled())
    before, now = world.visited[what][-2:]
    return Story(world.facts, f"Where was the {what} before the {now}?", before)


def two_arguments(drawn: random.Random) -> Story:
    """Two places beside a third; what is meant depends on who is subject and who object."""
    hub, first, second = drawn.sample(PLACES, 3)
    ways = drawn.sample(list(OPPOSITE), 2)
    facts = []
    for place, way in zip((first, second), ways, strict=True):
        told = [f"The {place} is {way} of the {hub}.", f"The {hub} is {OPPOSITE[way]} of the {place}."]
        facts.append(drawn.choice(told))
    way = ways[0]
    question, answer = drawn.choice(
        [
            (f"What is {way} of the {hub}?", first),
            (f"What is the {hub} {OPPOSITE[way]} of?", first),
            (f"What is {OPPOSITE[way]} of the {first}?", hub),
            (f"What is the {first} {way} of?", hub),
        ]
    )
    drawn.shuffle(facts)
    return Story(facts, question, answer)


def three_arguments(drawn: random.Random) -> Story:
    """Who gave what to whom; if it happened more than once the last time counts."""
    world = World(GIVERS, drawn)
    happenings = [world.move, world.take, world.leave, world.give, world.give]
    world.live(happenings, num_facts(5, drawn), lambda: bool(world.given))
    giver, what, receiver = world.given[-1 - drawn.randrange(min(3, len(world.given)))]
    question, position, known = drawn.choice(
        [
            (f"What did {giver} give to {receiver}?", 1, (giver, None, receiver)),
            (f"Who gave the {what} to {receiver}?", 0, (None, what, receiver)),
            (f"Who did {giver} give the {what} to?", 2, (giver, what, None)),
            (f"Who received the {what}?", 2, (None, what, None)),
            (f"Who gave the {what}?", 0, (None, what, None)),
        ]
    )
    fitting = [each for each in world.given if all(want in (None, got) for want, got in zip(known, each, strict=True))]
    return Story(world.facts, question, fitting[-1][position])


# ---- the original files


@lru_cache(maxsize=8)
def stories(source: str, task: int, part: str) -> list[Story]:
    """All stories of a task in the original archive or an unpacked folder.  part: train or test"""
    name = re.compile(rf"en/qa{task}_.*_{part}\.txt$")
    for path, text in files(Path(source)):
        if name.search(path):
            return list(parsed(text))
    raise ValueError(f"babi must be the archive or folder of bAbI with en/qa{task}_..._{part}.txt, got {source}")


def files(source: Path) -> Iterator[tuple[str, str]]:
    if not source.exists():
        raise ValueError(f"babi must be the archive or folder of bAbI, got {source}, which does not exist")
    if source.is_dir():
        yield from ((path.as_posix(), path.read_text()) for path in sorted(source.rglob("*.txt")))
        return
    with tarfile.open(source) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None and member.name.endswith(".txt"):
                yield member.name, file.read().decode()


def parsed(text: str) -> Iterator[Story]:
    """Every question of a file, with all facts before it; a line that is numbered 1 begins another story."""
    facts: list[str] = []
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        facts = [] if number == "1" else facts
        if "\t" in rest:
            question, answer, *_ = rest.split("\t")
            yield Story(list(facts), question.strip(), answer.strip())
        else:
            facts.append(rest.strip())
