"""The one training loop, for every net: seeded, resumable, with the baselines in sight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from models.nets import build
from models.runtimes import NoSuchDevice
from models.training.parts import identity
from models.windows import Windows

Schedule = Literal["baseline", "optimised"]
FLOOR = 1e-6  # learning rate at the end of the cosine
WARM_UP = 0.05  # share of all steps


class AnotherRun(ValueError):
    """A state that was written by another run than the one that wants to go on from it."""


@dataclass(frozen=True)
class Recipe:
    """Every knob of a training run; the defaults are the seed recipe."""

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Schedule = "optimised"
    negatives: int = 3  # of the same article, for each window of a two-tower; a near miss comes on top
    noise: float = 0.0  # standard deviation, per vector, of Gaussian noise added to unit contexts
    reverse: float = 0.0  # share of batches read backwards: from what follows, predict what came before
    teachers: tuple[str, ...] = ()  # ids of the versions to learn from
    distil: float = 0.5  # share of the target that is the teachers' answer
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought: mean loss, held-out score, learning rate at its end."""

    number: int
    loss: float
    score: float
    learning_rate: float


def warm_up_cosine(step: int, total: int, peak: float) -> float:
    """Return the factor on `peak` at `step`: 5 % linear warm-up, then cosine down to 1e-6."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    floor = FLOOR / peak
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def find(device: str) -> torch.device:
    """Return a device of torch; raises `NoSuchDevice` where it is none, or not here."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise NoSuchDevice(f"torch sees no {device} here") from error


class Trainer:
    """Trains one net on windows; holds all the state that resuming needs. `measure` is what `score` returns."""

    measure = "cosine"

    def __init__(
        self,
        architecture: str,
        config: dict[str, Any],
        recipe: Recipe,
        train: Windows,
        device: str = "cpu",
        teacher: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, find(device)
        self.architecture, self.config = architecture, config
        self.data = identity(train)
        self.net: nn.Module = self.make_net().to(self.device)
        self.vectors = torch.from_numpy(train.vectors).to(self.device)
        self.start = torch.from_numpy(train.start)
        self.length = train.length
        self.unit = train.vectors.shape[1]  # by which a loss is multiplied to be reported: MSE is per dimension
        self.taught = self._ask(teacher.to(self.device)) if teacher else None
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.steps = math.ceil(len(train) / recipe.batch_size) * recipe.epochs
        self.scheduler = self._scheduler()
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}

    def make_net(self) -> nn.Module:
        """Return the fresh net; raises `BadConfig` as `build` does."""
        return build(self.architecture, self.config)

    def _scheduler(self) -> LRScheduler | ReduceLROnPlateau:
        if self.recipe.schedule == "baseline":
            return ReduceLROnPlateau(self.optimizer, mode="max", patience=3, factor=0.5)
        peak = self.recipe.learning_rate
        return LambdaLR(self.optimizer, lambda step: warm_up_cosine(step, self.steps, peak))

    def run(self, held_out: Windows, save_to: Path | str, report: Callable[[Epoch], None]) -> nn.Module:
        """Train to the last epoch, saving the state after each; return the net of the best epoch."""
        while len(self.history) < self.recipe.epochs:
            epoch = self._epoch(held_out)
            if epoch.score > self.best_score:
                self.best = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
            self.history.append(epoch)
            self.save(save_to)
            report(epoch)
        self.net.load_state_dict(self.best)
        return self.net.eval()

    def _epoch(self, held_out: Windows) -> Epoch:
        self.net.train()
        losses = [self._step(rows) for rows in self.batches(len(self.history))]
        score = self.score(held_out)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        rate = self.optimizer.param_groups[0]["lr"]
        return Epoch(len(self.history) + 1, float(np.mean(losses)), score, rate)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Yield the first rows `(B,)` of the windows of each batch of an epoch."""
        order = torch.Generator().manual_seed(self.recipe.seed * 10_007 + epoch)
        shuffled = self.start[torch.randperm(len(self.start), generator=order)]
        yield from torch.split(shuffled, self.recipe.batch_size)

    def loss(self, start: Tensor) -> Tensor:
        """Return the loss on the windows that begin at the rows `start` `(B,)`."""
        backwards = bool(self.recipe.reverse and torch.rand(()) < self.recipe.reverse)
        context, target = self._gather(start, backwards)
        if self.taught is not None:
            target = torch.lerp(target, self.taught[int(backwards)][start.to(self.device)], self.recipe.distil)
        if self.recipe.noise:
            scale = self.recipe.noise / context.shape[2] ** 0.5
            context = normalize(context + scale * torch.randn_like(context), dim=2)
        return mse_loss(self.net(context), target)

    def _step(self, start: Tensor) -> float:
        loss = self.loss(start)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.optimizer.step()
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.step()
        reported: float = loss.item() * self.unit
        return reported

    @torch.no_grad()
    def _ask(self, teacher: nn.Module) -> Tensor:
        """Return the teacher's answers `(2, N, D)`, or `(1, N, D)` where no batch is read backwards.

        The first index says whether the window is, the second is its first row. Asked once, for all epochs.
        """
        taught = self.vectors.new_zeros(2 if self.recipe.reverse else 1, *self.vectors.shape)
        for backwards, answers in enumerate(taught):
            for start in torch.split(self.start, 1024):
                answers[start] = teacher(self._gather(start, bool(backwards))[0])
        return taught

    def _gather(self, start: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        rows = start[:, None] + torch.arange(self.length + 1)
        rows = rows.flip(1) if backwards else rows
        block = self.vectors[rows.to(self.device)]  # (B, T + 1, D)
        return block[:, :-1], block[:, -1]

    @property
    def best_score(self) -> float:
        """The held-out score of the best epoch so far, below -1 before the first."""
        return max((epoch.score for epoch in self.history), default=-math.inf)

    @torch.no_grad()
    def score(self, data: Windows) -> float:
        """Return the mean cosine between prediction and true next vector over `data`."""
        self.net.eval()
        total = 0.0
        for rows in np.array_split(np.arange(len(data)), max(1, len(data) // 1024)):
            context = torch.from_numpy(data.vectors[data.rows()[rows]]).to(self.device)
            target = torch.from_numpy(data.vectors[data.target[rows]]).to(self.device)
            total += cosine_similarity(self.net(context), target).sum().item()
        return total / len(data)

    def save(self, path: Path | str) -> None:
        """Write the state to `path` atomically."""
        path = Path(path)
        state = {
            "architecture": self.architecture,
            "config": self.config,
            "recipe": asdict(self.recipe),
            "data": self.data,
            "net": self.net.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def resume(self, path: Path | str) -> None:
        """Go on from the state in `path`.

        Raises:
            AnotherRun: it is none, or belongs to another net, configuration, recipe or training set.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            mine = (self.architecture, self.config, self.recipe, self.data)
            theirs = (state["architecture"], state["config"], Recipe(**state["recipe"]), state.get("data", self.data))
        except FileNotFoundError as error:
            raise AnotherRun(f"no run was stopped that left {path}") from error
        except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise AnotherRun(f"{path} is no state of a run") from error
        if theirs != mine:
            raise AnotherRun(f"{path} was written by another run: {state['recipe']}")
        self.net.load_state_dict(state["net"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"].cpu())
        self.history = [Epoch(**epoch) for epoch in state["history"]]
