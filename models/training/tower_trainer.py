"""Training of a two-tower: symmetric InfoNCE, negatives from the same article, mined near misses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.evaluate import rank_metrics, ranks
from models.nets import build
from models.nets.two_tower import PassageTower, TwoTower, info_nce
from models.recipe import Recipe
from models.training.negatives import Negatives, near_misses
from models.training.train import Trainer, in_contexts
from models.vectors import Floats
from models.windows import Windows, compact_windows

MINED = 4  # near misses kept for each window
BANK = 4096  # windows whose chunks are searched together for near misses: about a corpus's worth


class TowerTrainer(Trainer):
    """Trains a query tower of the net `architecture` with its payload tower; the score of an epoch is the MRR."""

    measure = "MRR"
    loss_is_per_dimension = False
    net: TwoTower

    def __init__(
        self, architecture: str, config: dict[str, Any], recipe: Recipe, train: Windows, device: str = "cpu"
    ) -> None:
        # held-out chunks must not serve as wrong answers either
        super().__init__(architecture, config, recipe, compact_windows(train), device)
        self.negatives = Negatives(self.windows, recipe.negatives)

    def make_net(self) -> TwoTower:
        """Return untrained towers; raises `BadConfig`."""
        return TwoTower(build(self.architecture, self.config), PassageTower(self.config["dim"]))

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Mine near misses with the current towers, then yield batches as every trainer does."""
        self.mine()
        self.net.train()
        yield from super().batches(epoch)

    @torch.no_grad()
    def mine(self) -> None:
        """Find the near misses of every window among the chunks near it."""
        self.net.eval()
        for start in torch.split(self.start, BANK):
            first, end = int(start[0]), int(start[-1]) + self.length + 1
            passages = self.net.payload(self.vectors_at(torch.arange(first, end)))
            for part in torch.split(start, 512):
                scores = self.net(self.contexts(part)) @ passages.T
                self.negatives.remember(part, near_misses(scores.cpu(), part, first, self.length + 1, MINED))

    def contexts(self, start: Tensor) -> Tensor:
        """Return the contexts `(B, T, D)` that begin at rows `start`."""
        return self.vectors_at(start[:, None] + torch.arange(self.length))

    def loss(self, start: Tensor) -> Tensor:
        """Return the symmetric InfoNCE loss of the windows that begin at the rows `start` `(B,)`."""
        window = start[:, None] + torch.arange(self.length + 1)
        rows = torch.cat([window[:, -1:], self.negatives.draw(start)], dim=1)  # (B, 1 + K + 1)
        with self.mixed_precision():
            payload = self.net.payload(self.vectors_at(rows).flatten(0, 1)).unflatten(0, rows.shape).float()
            query = self.net(self.contexts(start)).float()
        return info_nce(query, payload[:, 0], payload[:, 1:], in_contexts(window).to(self.device))

    @torch.no_grad()
    def score(self, data: Windows) -> float:
        """Return the MRR of the true next chunks among all chunks of the windows' articles, contexts left out."""
        self.net.eval()
        bank = compact_windows(data)
        passages = self.net.payload(torch.from_numpy(np.asarray(bank.vectors)).to(self.device)).cpu().numpy()
        found = [
            self._ranks(bank, passages, rows) for rows in np.array_split(np.arange(len(bank)), len(bank) // 512 + 1)
        ]
        return rank_metrics(np.concatenate(found))["MRR"]

    def _ranks(self, bank: Windows, passages: Floats, rows: Any) -> Any:
        context = bank.rows()[rows]
        queries = self.net(torch.from_numpy(bank.vectors[context]).to(self.device)).cpu().numpy()
        return ranks(queries, passages, context, bank.target[rows])[1]
