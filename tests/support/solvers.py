"""Solvers of every task, written from the task's definition: each sees the ids alone and says what is due.

They share nothing with the tasks: no method of a task but its sizes is used. `guess` answers at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rows = list[list[int]]
Solver = Callable[[Any, list[int], list[bool]], list[int]]
"""Task, the ids of a row, and where it is asked -> a guess for every token"""


def solved(task: Any, solver: Solver, ids: Tensor, is_asked: Tensor) -> Tensor:
    rows = zip(ids.tolist(), is_asked.tolist(), strict=True)
    return torch.tensor([solver(task, row, asked) for row, asked in rows])


def recall_pairs(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    """MQAR: pairs stand at the beginning; a key of several tokens ends where its value is asked for."""
    width, found = task.key_tokens, {}
    for first in range(0, (width + 1) * (task.pairs + task.overwritten), width + 1):
        found[tuple(ids[first : first + width])] = ids[first + width]
    return [found.get(tuple(ids[max(place - width + 1, 0) : place + 1]), 0) for place in range(len(ids))]


def after_the_first_special(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    first = ids.index(task.vocabulary - 1)
    return [ids[first + 1]] * len(ids)


def say_again(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    sign = ids.index(task.vocabulary - 1)
    said = [token for token in ids[:sign] if token < task.vocabulary - 2]
    return [0] * (sign + 1) + said


def what_followed(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    """A key's value is what stood behind it before; noise and values are no keys."""
    seen: dict[int, int] = {}
    guesses = []
    for place, token in enumerate(ids):
        guesses.append(seen.get(token, 0))
        if token < task.vocabulary // 2 and place + 1 < len(ids):
            seen[token] = ids[place + 1]
    return guesses


def what_motif_followed(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    """Keys and values are runs of tokens of their halves of the vocabulary."""
    half, guesses, seen = task.vocabulary // 2, [0] * len(ids), dict[str, list[int]]()
    letters = "".join("k" if token < half else "v" if token < task.vocabulary else "." for token in ids)
    for match in re.finditer(r"(k+)(v+)", letters):
        key, value = (ids[slice(*match.span(group))] for group in (1, 2))
        known = seen.setdefault(str(key), value)
        first = match.end(1) - 1
        guesses[first : first + len(known)] = known
    return guesses


def copy(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    return ids


def learned_map(task: Any) -> Solver:
    """Memorisation: the map is read off other sequences than those that are asked about."""
    other = task.draw(64, torch.Generator().manual_seed(99))
    known = dict(zip(other.ids[:, 0::2].flatten().tolist(), other.answers[:, 1::2].flatten().tolist(), strict=True))

    def solver(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
        return [0, *(known.get(token, -1) for token in ids[:-1])]

    return solver


def counted(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    return [sum(ids[: place + 1]) % task.modulus for place in range(len(ids))]


def is_anbn(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
    word = "".join("ab.ny."[token] for token in ids[:-1]).lstrip(".")
    half = len(word) // 2
    return [4 if word == "a" * half + "b" * half else 3] * len(ids)


# ---- texts: what is due is found by reading, and laid where it is asked for


def by_reading(find: Callable[[Any, str], list[str]]) -> Solver:
    def solver(task: Any, ids: list[int], asked: list[bool]) -> list[int]:
        begin = asked.index(True)
        found = iter(b"".join(answer.encode() for answer in find(task, bytes(ids[: begin + 1]).decode("latin-1"))))
        return [next(found, 0) if is_asked else 0 for is_asked in asked]

    return solver


def needle_values(task: Any, text: str) -> list[str]:
    if task.brief:
        (key,) = re.findall(r"([a-z]+-[a-z]+): $", text)
        return re.findall(rf"(?m)^{key}: (\S+)$", text)
    asked = re.findall(r"for (.+?) mentioned", text)[-1].replace(" and ", " ").split(", ")
    return [
        value
        for key in asked
        for value in re.findall(rf"One of the special magic \w+ for {key} is: ([\w-]+)\.\n", text)
    ]


def pass_key(task: Any, text: str) -> list[str]:
    return re.findall(r"The pass key is (\d{5})\. Remember it", text)


def variables(task: Any, text: str) -> list[str]:
    known = {re.findall(r"assigned the value (\d+)", text)[-1]}
    names = []
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\n", text):
        if source in known:
            known.add(name)
            names.append(name)
    return names


def story_answer(task: Any, text: str) -> list[str]:
    """Reads bAbI's sentences one by one; knows where everybody is, who holds what, and what was given."""
    question = re.findall(r"Question: (.*)\n", text)[-1]
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    trace: dict[str, list[str]] = {}
    given: list[tuple[str, str, str]] = []
    beside: dict[tuple[str, str], str] = {}
    opposite = dict(north="south", south="north", east="west", west="east")
    for line in text.split("\n"):
        if match := re.fullmatch(r"(\w+) (?:moved|went|journeyed|travelled|went back) to the (\w+)\.", line):
            who, where = match.groups()
            place[who] = where
            for what in (each for each, holding in holder.items() if holding == who):
                trace[what].append(where)
        elif match := re.fullmatch(r"(\w+) (?:picked up|grabbed|got|took) the (\w+)(?: there)?\.", line):
            who, what = match.groups()
            holder[what] = who
            if not trace.get(what) or trace[what][-1] != place.get(who):
                trace.setdefault(what, []).append(place.get(who, ""))
        elif match := re.fullmatch(r"(\w+) (?:dropped|put down|left|discarded) the (\w+)(?: there)?\.", line):
            holder.pop(match[2], None)
        elif match := re.fullmatch(r"(\w+) (?:gave|passed|handed) the (\w+) to (\w+)\.", line):
            given.append((match[1], match[2], match[3]))
            holder[match[2]] = match[3]
        elif match := re.fullmatch(r"The (\w+) is (north|south|east|west) of the (\w+)\.", line):
            first, way, second = match.groups()
            beside[way, second], beside[opposite[way], first] = first, second
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return [trace[match[1]][-1]]
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return [place[match[1]]]
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        visited = trace[match[1]]
        return [visited[len(visited) - 2 - visited[::-1].index(match[2])]]
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return [beside[match[1], match[2]]]
    if match := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
        return [beside[opposite[match[2]], match[1]]]
    forms = {
        r"What did (?P<giver>\w+) give to (?P<receiver>\w+)\?": 1,
        r"Who gave the (?P<what>\w+)(?: to (?P<receiver>\w+))?\?": 0,
        r"Who did (?P<giver>\w+) give the (?P<what>\w+) to\?": 2,
        r"Who received the (?P<what>\w+)\?": 2,
    }
    for form, position in forms.items():
        if match := re.fullmatch(form, question):
            known = match.groupdict()
            order = [known.get(name) for name in ("giver", "what", "receiver")]
            fitting = [each for each in given if all(w in (None, g) for w, g in zip(order, each, strict=True))]
            return [fitting[-1][position]]
    raise AssertionError(question)


def random_label(labels: tuple[str, ...], seed: int) -> Solver:
    drawn = random.Random(seed)
    return by_reading(lambda task, text: [drawn.choice(labels)])
