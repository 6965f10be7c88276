"""Many conversations with one model on one thread: decoded by rows, by groups and one by one; what one of them holds.

    python -m benchmarks.speed.conversations          # writes benchmarks/results/conversations.json
    python -m benchmarks.speed.conversations_report   # and its tables in docs/benchmarks.md

- 16 conversations of different lengths are given a token each, again and again: as rows of one batch, by groups (as
  a pool does where a model cannot go by rows; here each is a group) and one by one, without pool. The ways take turns,
  greedily from the same prompts; how far their logits are apart is noted.
- MAG also as rows with compiled steps; what their first 16 tokens take, on the clock, is compiling.
- 24 conversations come, read a prompt, are answered and go, at most 16 at a time: together in a pool, and one by one.
- One conversation of MAG is streamed, really, to a million tokens: its bytes on the way, beside those of a
  key-value cache.

Random weights in float32, one thread, CPU time of the process. `--quick` takes tiny sizes and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, describe_machine
from benchmarks.records import Record
from benchmarks.speed.measure import spread
from titans_pytorch import ConversationPool, TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_pytorch.cuda_graphs.numbers import tensors
from titans_pytorch.titans.language_model import TitansLanguageModel

VARIANTS = {"mag": TitansMAG, "mac": TitansMAC, "lmm": TitansLMM, "mal": TitansMAL}
STREAMED, COMPILED = ("mag",), ("mag",)
NUM_TOKENS = 256
Decode = Callable[[int], Tensor]
"""Reads so many tokens of every conversation, each the likeliest after those before.  -> last logits (b num_tokens)"""


class Sizes(NamedTuple):
    """What is measured."""

    dim: int = 256
    depth: int = 2
    window: int = 128
    conversations: int = 16
    longest: int = 500  # tokens of a prompt
    tokens: int = 16  # of every conversation in a round
    rounds: int = 3
    served: int = 24
    asked: int = 64  # tokens of a question, at most
    answered: int = 32  # tokens of an answer, at most
    stream_dim: int = 32
    stream_depth: int = 1
    lengths: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)


QUICK = Sizes(16, 1, 8, conversations=3, longest=20, tokens=2, rounds=1, served=3, asked=5, answered=3, stream_dim=16)
QUICK = QUICK._replace(stream_depth=1, lengths=(50, 100))


def model_of(variant: str, dim: int, depth: int, window: int) -> TitansLanguageModel:
    """A model of the family with random weights, memories of chunks of 16 tokens that are renewed after 64."""
    torch.manual_seed(0)
    config = TitansConfig(dim=dim, depth=depth, window=window, memory_chunk=16, memory_refresh=64)
    model: TitansLanguageModel = VARIANTS[variant](NUM_TOKENS, config)
    return model.eval()


def prompts(count: int, longest: int, random: Random) -> list[Tensor]:
    """Random ids of different lengths, from a tenth of the longest on."""
    lengths = random.sample(range(max(longest // 10, 1), longest + 1), count)
    return [torch.tensor([random.randrange(NUM_TOKENS) for _ in range(length)]) for length in lengths]


def in_pool(model: TitansLanguageModel, given: list[Tensor], compiles: bool = False) -> Decode:
    """All conversations in a pool."""
    pool = ConversationPool(model, compile=compiles)
    answers = pool.advance({pool.open(): ids for ids in given})

    def decode(count: int) -> Tensor:
        nonlocal answers
        for _ in range(count):
            answers = pool.advance({each: logits.argmax()[None] for each, logits in answers.items()})
        return torch.stack(list(answers.values()))

    return decode


def one_by_one(model: TitansLanguageModel, given: list[Tensor]) -> Decode:
    """Each conversation by itself, one after the other."""
    states: list[Any] = [model(ids[None]) for ids in given]

    def decode(count: int) -> Tensor:
        for row, (logits, state) in enumerate(states):
            for _ in range(count):
                logits, state = model(logits[:, -1:].argmax(dim=-1), state)
            states[row] = logits, state
        return torch.cat([logits[:, -1] for logits, _ in states])

    return decode


def grouped(variant: str, sizes: Sizes) -> TitansLanguageModel:
    """The model that is measured, as one that cannot go by rows."""
    model = model_of(variant, sizes.dim, sizes.depth, sizes.window)
    model.by_rows = lambda compiles=False: None  # type: ignore[method-assign]
    return model


def decoding(variant: str, sizes: Sizes) -> Record:
    """Tokens per second of each way, which take turns."""
    model = model_of(variant, sizes.dim, sizes.depth, sizes.window)
    given = prompts(sizes.conversations, sizes.longest, Random(0))
    ways = {
        "rows": in_pool(model, given),
        "groups": in_pool(grouped(variant, sizes), given),
        "one by one": one_by_one(model, given),
    }
    if variant in COMPILED:
        ways["rows, compiled"] = in_pool(model, given, compiles=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    last, first = {}, {}
    for name, decode in ways.items():  # warms up, over the end of a chunk of every conversation
        start = time.perf_counter()
        last[name] = decode(sizes.tokens)
        first[name] = time.perf_counter() - start
    for _ in range(sizes.rounds):
        for name, decode in ways.items():
            start = time.process_time()
            last[name] = decode(sizes.tokens)
            seconds[name].append(time.process_time() - start)
    apart = {name: (logits - last["one by one"]).abs().max().item() for name, logits in last.items()}
    found = {name: spread(each) | {"apart": apart[name], "first": first[name]} for name, each in seconds.items()}
    total = sizes.tokens * sizes.conversations
    return {name: each | {"tokens_per_second": total / each["seconds"]} for name, each in found.items()}


class Talk(NamedTuple):
    """A question, and how many tokens answer it."""

    question: Tensor
    num_answered: int


def talks(sizes: Sizes) -> list[Talk]:
    """Questions and answers of different lengths."""
    random = Random(1)
    found = []
    for _ in range(sizes.served):
        length = random.randint(1, sizes.asked)
        ids = torch.tensor([random.randrange(NUM_TOKENS) for _ in range(length)])
        found.append(Talk(ids, random.randint(1, sizes.answered)))
    return found


def serve_together(model: TitansLanguageModel, given: list[Talk], at_once: int) -> None:
    """So many conversations at once, the next one coming where one has been answered."""
    pool, waiting = ConversationPool(model), list(reversed(given))
    left: dict[int, int] = {}
    to_read: dict[int, Tensor] = {}
    while waiting or left:
        while waiting and len(left) < at_once:
            talk = waiting.pop()
            number = pool.open()
            left[number], to_read[number] = talk.num_answered, talk.question
        answers = pool.advance(to_read)
        for number in to_read:
            left[number] -= 1
            if left[number] == 0:
                pool.close(number)
                del left[number]
        to_read = {number: answers[number].argmax()[None] for number in left}


def serve_one_by_one(model: TitansLanguageModel, given: list[Talk], at_once: int) -> None:
    """One conversation after the other."""
    for question, num_answered in given:
        logits, state = model(question[None])
        for _ in range(num_answered - 1):
            logits, state = model(logits[:, -1:].argmax(dim=-1), state)


def serving(variant: str, sizes: Sizes) -> Record:
    """Conversations per second that come and go."""
    model, given = model_of(variant, sizes.dim, sizes.depth, sizes.window), talks(sizes)
    ways = {"together": serve_together, "one by one": serve_one_by_one}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + max(1, sizes.rounds // 2)):
        for name, serve in ways.items():
            start = time.process_time()
            serve(model, given[: sizes.conversations] if turn == 0 else given, sizes.conversations)
            seconds[name] += [time.process_time() - start] if turn else []
    found = {name: spread(each) for name, each in seconds.items()}
    return {name: each | {"per_second": len(given) / each["seconds"]} for name, each in found.items()}


def pieces(total: int, longest: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random ids, piece by piece."""
    for start in range(0, total, longest):
        yield torch.randint(0, NUM_TOKENS, (min(longest, total - start),), generator=generator)


def bytes_held(variant: str, sizes: Sizes) -> list[Record]:
    """What a conversation holds at each length, all of whose tokens are read, and how fast it goes on from there."""
    model = model_of(variant, sizes.stream_dim, sizes.stream_depth, sizes.window)
    pool, generator, found, start = ConversationPool(model), torch.Generator().manual_seed(0), [], time.process_time()
    one = pool.open()
    for length in sizes.lengths:
        for ids in pieces(length - pool.num_tokens(one), 4096, generator):
            logits = pool.advance({one: ids})[one]
        state = pool.state(one)
        found.append(
            {
                "tokens": pool.num_tokens(one),
                "state_bytes": sum(tensor.nbytes for tensor in tensors(state)),
                "snapshot_bytes": len(pool.snapshot(one)),
                "cache_bytes": cache_bytes(sizes.stream_dim, sizes.stream_depth, length),
                "is_finite": bool(logits.isfinite().all()),
                "seconds": time.process_time() - start,
            }
        )
    return found


def cache_bytes(dim: int, depth: int, num_tokens: int) -> int:
    """What keys and values of so many tokens take, float32, of attention to all of them in as many layers as wide."""
    return 2 * depth * dim * num_tokens * 4


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some; runs of others stay as they are"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "conversations.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if arguments.quick else Sizes()
    record: Record = {"sizes": sizes._asdict(), "runs": {}}
    if arguments.out.exists() and not arguments.quick:
        record["runs"] = json.loads(arguments.out.read_text())["runs"]
    for variant in arguments.only:
        run: Record = {
            "machine": describe_machine(),
            "decoding": decoding(variant, sizes),
            "serving": serving(variant, sizes),
        }
        run["held"] = bytes_held(variant, sizes) if variant in STREAMED else []
        record["runs"][variant] = run
        print(variant, json.dumps(run))
        if not arguments.quick:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
