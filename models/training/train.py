"""The training loop for every net: seeded and resumable."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.nets import build
from models.nets.two_tower import info_nce
from models.recipe import Recipe
from models.runtimes import NoSuchDevice
from models.training.work_cache import arrays_digest
from models.vectors import Floats
from models.windows import Windows

FLOOR = 1e-6  # learning rate at the end of the cosine
WARM_UP = 0.05  # share of all steps
_BLOCK = 1024  # windows that a net answers at a time


class AnotherRun(ValueError):
    """The file to resume from is not the state of this run."""


@dataclass(frozen=True)
class Epoch:
    """The outcome of one epoch: mean loss, held-out score, and learning rate at its end."""

    number: int
    loss: float
    score: float
    learning_rate: float


def warm_up_cosine(step: int, total: int, peak: float) -> float:
    """Return the factor on the learning rate `peak` at `step`: linear warm-up over 5 %, then cosine down to 1e-6."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    floor = FLOOR / peak
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def torch_device(name: str) -> torch.device:
    """Return a torch device that tensors can be made on; raises `NoSuchDevice`."""
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise NoSuchDevice(f"torch sees no {name} here") from error


def with_dropped(context: Tensor, share: float) -> Tensor:
    """Replace a random `share` of the vectors of contexts `(B, T, D)` by the mean of the others, of unit length.

    The last vector of a context stays if all others are dropped, too.
    """
    kept = torch.rand(context.shape[:2], device=context.device) >= share
    kept[:, -1] |= ~kept.any(dim=1)
    mean = normalize((context * kept[:, :, None]).sum(dim=1, keepdim=True), dim=2)
    return torch.where(kept[:, :, None], context, mean)


def in_contexts(rows: Tensor) -> Tensor:
    """Return which next chunk is in whose context, `(B, B)`, of windows with the rows `(B, T + 1)`."""
    return (rows[:, :-1, None] == rows[:, -1]).any(dim=1)


class Trainer:
    """Trains one net to predict the next vector, and holds all state that resuming needs.

    `measure` names what `score` returns. A subclass for another objective overrides `make_net`, `loss` and `score`.

    Raises:
        BadConfig: the net does not have such sizes.
        NoSuchDevice: torch does not have the device.
    """

    measure = "cosine"
    loss_is_per_dimension = True

    def __init__(
        self, architecture: str, config: dict[str, Any], recipe: Recipe, train: Windows, device: str = "cpu"
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.device = torch_device(device)
        self.architecture = architecture
        self.config = config
        self.windows = train
        self.data = arrays_digest(train)
        self.net: nn.Module = self.make_net().to(self.device)
        self._on_device = None if self.device.type == "cpu" else torch.from_numpy(np.asarray(train.vectors)).to(device)
        self.start = torch.from_numpy(train.start)
        self.length = train.length
        self.teacher_answers: Floats | None = None
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        average = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.net, multi_avg_fn=average) if recipe.ema else None
        self.steps = math.ceil(len(train) / recipe.batch_size) * recipe.epochs
        self.scheduler = self._scheduler()
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}

    def make_net(self) -> nn.Module:
        """Return the untrained net; raises `BadConfig`."""
        return build(self.architecture, self.config)

    def _scheduler(self) -> LRScheduler | ReduceLROnPlateau:
        if self.recipe.schedule == "baseline":
            return ReduceLROnPlateau(self.optimizer, mode="max", patience=3, factor=0.5)
        peak = self.recipe.learning_rate
        return LambdaLR(self.optimizer, lambda step: warm_up_cosine(step, self.steps, peak))

    @torch.no_grad()
    def learn_from(self, teacher: nn.Module, directory: Path | None = None) -> None:
        """Mix the teacher's answers into the targets, by the recipe's share.

        The teacher answers every window once, for all epochs, in the recipe's precision. `teacher_answers` is
        `(2, N, D)`, indexed by whether the window is read backwards and by its first row; `(1, N, D)` if the recipe
        reads no batch backwards. It is a temporary file in `directory`.
        """
        teacher = teacher.to(self.device)
        shape = (2 if self.recipe.reverse else 1, *self.windows.vectors.shape)
        with tempfile.TemporaryFile(dir=directory) as file:
            answers = np.memmap(file, np.float32, "w+", shape=shape)
        for backwards, of_direction in enumerate(answers):
            for start in torch.split(self.start, _BLOCK):
                with self.mixed_precision():
                    answer = teacher(self.gather(start, bool(backwards))[0])
                of_direction[start] = answer.float().cpu().numpy()
        self.teacher_answers = answers

    def run(self, held_out: Windows, save_to: Path | str, report: Callable[[Epoch], None]) -> nn.Module:
        """Train to the last epoch and save the state after each; return the net of the best epoch."""
        while len(self.history) < self.recipe.epochs:
            epoch = self._epoch(held_out)
            if epoch.score > self.best_score:
                self.best = {name: tensor.clone() for name, tensor in self.judged.state_dict().items()}
            self.history.append(epoch)
            self.save(save_to)
            report(epoch)
        self.net.load_state_dict(self.best)
        return self.net.eval()

    def _epoch(self, held_out: Windows) -> Epoch:
        self.net.train()
        losses = [self.step(rows) for rows in self.batches(len(self.history))]
        score = self._score_of_judged(held_out)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(score)
        rate = self.optimizer.param_groups[0]["lr"]
        return Epoch(len(self.history) + 1, float(np.mean(losses)), score, rate)

    @property
    def judged(self) -> nn.Module:
        """The net that is scored and kept: the one in training or, if the recipe has an EMA, that of its weights."""
        return self.average.module if self.average else self.net

    def _score_of_judged(self, held_out: Windows) -> float:
        trained, self.net = self.net, self.judged
        try:
            return self.score(held_out)
        finally:
            self.net = trained

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Yield the first rows `(B,)` of the windows of each batch of an epoch."""
        order = torch.Generator().manual_seed(self.recipe.seed * 10_007 + epoch)
        shuffled = self.start[torch.randperm(len(self.start), generator=order)]
        yield from torch.split(shuffled, self.recipe.batch_size)

    def step(self, start: Tensor) -> float:
        """Take one optimiser step on the windows that begin at the rows `start` `(B,)`; return the loss.

        A loss that is a mean over dimensions is reported as the sum over them.
        """
        loss = self.loss(start)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.net)
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.step()
        scale = self.windows.vectors.shape[1] if self.loss_is_per_dimension else 1
        return float(loss.item() * scale)

    def loss(self, start: Tensor) -> Tensor:
        """Return the loss on the windows that begin at the rows `start` `(B,)`."""
        backwards = bool(self.recipe.reverse and torch.rand(()) < self.recipe.reverse)
        context, true = self.gather(start, backwards)
        target = true
        if self.teacher_answers is not None:
            answer = torch.from_numpy(self.teacher_answers[int(backwards)][start])
            target = torch.lerp(true, answer.to(self.device), self.recipe.distil)
        context = self._augmented(context)
        with self.mixed_precision():
            found = self.net(context).float()
        loss = mse_loss(found, target)
        if not self.recipe.contrast:
            return loss
        # the squared error is a mean over D, so that both are weighed as sums over it
        wrong = info_nce(found, true, true[:, None][:, :0], in_contexts(self._rows(start, backwards)).to(self.device))
        return loss + self.recipe.contrast / true.shape[1] * wrong

    def _augmented(self, context: Tensor) -> Tensor:
        if self.recipe.drop:
            context = with_dropped(context, self.recipe.drop)
        if self.recipe.noise:
            scale = self.recipe.noise / context.shape[2] ** 0.5
            context = normalize(context + scale * torch.randn_like(context), dim=2)
        return context

    @contextmanager
    def mixed_precision(self) -> Iterator[None]:
        """Compute products in bf16 in this context, if the recipe says so."""
        if self.recipe.precision != "bf16":
            yield
            return
        onednn: Any = torch.backends.mkldnn
        before = onednn.enabled
        # For a processor without bf16 oneDNN has no LSTM, but torch itself has.
        onednn.enabled = before and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        try:
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        finally:
            onednn.enabled = before

    def gather(self, start: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """Return the contexts `(B, T, D)` and next vectors `(B, D)` of windows, in either reading direction."""
        block = self.vectors_at(self._rows(start, backwards))  # (B, T + 1, D)
        return block[:, :-1], block[:, -1]

    def _rows(self, start: Tensor, backwards: bool) -> Tensor:
        rows = start[:, None] + torch.arange(self.length + 1)
        return rows.flip(1) if backwards else rows

    def vectors_at(self, rows: Tensor) -> Tensor:
        """Return the training vectors `(..., D)` of `rows` `(...)`, on the device; the CPU reads them from disk."""
        if self._on_device is None:
            return torch.from_numpy(self.windows.vectors[rows.numpy()])
        return self._on_device[rows.to(self.device)]

    @property
    def best_score(self) -> float:
        """The held-out score of the best epoch so far; minus infinity before the first."""
        return max((epoch.score for epoch in self.history), default=-math.inf)

    @torch.no_grad()
    def score(self, data: Windows) -> float:
        """Return the mean cosine between prediction and true next vector over `data`."""
        self.net.eval()
        total = 0.0
        for rows in np.array_split(np.arange(len(data)), max(1, len(data) // _BLOCK)):
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
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self.history],
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def resume(self, path: Path | str) -> None:
        """Continue from the state in `path`.

        Raises:
            AnotherRun: the file is missing or not a state, or belongs to another net, config, recipe or training set.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            this_run = (self.architecture, self.config, self.recipe, self.data)
            saved_run = (
                state["architecture"],
                state["config"],
                Recipe(**state["recipe"]),
                state.get("data", self.data),
            )
        except FileNotFoundError as error:
            raise AnotherRun(f"{path}: no saved training state here; start without --resume") from error
        except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise AnotherRun(f"{path}: not the state of a training run") from error
        if saved_run != this_run:
            raise AnotherRun(f"{path}: written by another run, with the recipe {state['recipe']}")
        self.net.load_state_dict(state["net"])
        self.best = state["best"]
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"].cpu())
        self.history = [Epoch(**epoch) for epoch in state["history"]]
