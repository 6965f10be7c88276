"""A gain through the blocks of a renewal: one product with a table of what each gate leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.fast_weights.loop.evolution import Evolution, Others


class ByTable(Evolution):
    """A gain, so small that one product with a table moves it through a whole renewal of k blocks of one chunk.

    rows: (N+1 r a+k-1+L d): every slot at the start of a renewal; the gains at the starts of the blocks of the renewal
    before it, but its first; P y of each of its tokens. table: (N r a+k-1 a+k-1+L), from the rows of one renewal to
    the head of those of the next
    """

    def __init__(self, rows: Tensor, table: Tensor, num_slots: int) -> None:
        self.rows, self.table, self.num_slots = rows, table, num_slots
        self.head = table.shape[2]
        self.per_renewal = self.head - num_slots + 1
        self.each, self.each_table = rows.unbind(0), table.unbind(0)
        self.heads = [each[:, : self.head] for each in self.each]
        self.num_places = len(table)
        self.starts = [self.by_block(self.heads[:-1], slot) for slot in range(num_slots)]
        self.ends = [self.by_block(self.heads[1:], slot) for slot in range(num_slots)]

    def by_block(self, heads: list[Tensor], slot: int) -> list[Tensor]:
        """A slot for every block of each renewal: of its start or its end, as only readers look inside."""
        found = [head[None, :, slot : slot + 1] for head in heads]
        return [found[block // self.per_renewal] for block in range(self.per_renewal * len(found))]

    def of_slot(self, slot: int, index: int) -> Tensor:
        if slot > 0:
            return self.rows[:-1, :, slot, None].unsqueeze(1)
        return self.weights_of(index, 0, self.num_places).movedim(2, 1)

    def bases(self, index: int) -> Tensor:
        return self.rows[:-1, :, 0, None]

    def weights_of(self, index: int, first: int, num: int) -> Tensor:
        at_start = self.rows[first : first + num, :, :1]
        between = self.rows[first + 1 : first + num + 1, :, self.num_slots : self.head]
        return (at_start if self.per_renewal == 1 else torch.cat((at_start, between), dim=2)).unsqueeze(3)

    def forward(self, n: int) -> None:
        torch.bmm(self.each_table[n], self.each[n], out=self.heads[n + 1])

    def begin_backward(self, last_bars: list[Tensor | None], others: list[Others | None]) -> None:
        self.bar = torch.zeros_like(self.rows)
        for slot, last in enumerate(last_bars):
            if last is not None:
                self.bar[-1, :, slot] = last[0, :, 0]
        if others[0] is not None:
            by_renewal = others[0].parts[0][:, :, :, 0]  # (N k r d)
            self.bar[:-1, :, 0] = by_renewal[:, 0]
            self.bar[1:, :, self.num_slots : self.head] = by_renewal[:, 1:].movedim(1, 2)
        self.each_bar = self.bar.unbind(0)
        self.head_bars = [each[:, : self.head] for each in self.each_bar]
        self.bars = [self.by_block(self.head_bars, slot) for slot in range(self.num_slots)]

    def of_readers(self, n: int) -> Tensor:
        return self.head_bars[n][None, :, :1]

    def bars_after(self, n: int) -> Tensor:
        return self.head_bars[n + 1][:, : self.num_slots].unsqueeze(2).transpose(0, 1)

    def factor_bars(self, n: int) -> tuple[Tensor, Tensor]:
        self.each_bar[n].baddbmm_(self.each_table[n].mT, self.head_bars[n + 1])  # the gradient of its start, too
        right_bar = self.each_bar[n][:, self.head :]
        return right_bar, right_bar

    def start_bar(self, n: int) -> None:
        """It is there."""

    def gate_bars(self) -> list[Tensor]:
        found = torch.bmm(self.bar[1:, :, : self.head].flatten(0, 1), self.rows[:-1].flatten(0, 1).mT)
        return [found.unflatten(0, self.table.shape[:2])]
