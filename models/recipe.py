"""What a training run is made of: the recipe of the optimisation, and the job around it. Standard library only.

Fields that are annotated with an `Option` are the options of `lvm train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

Schedule = Literal["baseline", "optimised"]
TrainingPrecision = Literal["float32", "bf16"]
RERANKER = "reranker"
NAMED_DIR = "[NAME=]DIR"
# Also a file of vectors, or of contexts and next vectors.
NAMED_DATA = "[NAME=]DIR|FILE"
VERSION = "VERSION"
ALIAS_OR_VERSION = "ALIAS|VERSION"


class DataSet(NamedTuple):
    """A directory of vectors, and the name that a card gives it."""

    name: str
    directory: Path


@dataclass(frozen=True)
class Option:
    """How a command line offers a field: `metavar` and `flag` if they differ from its type and name."""

    help: str
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    flag: str | None = None
    is_argument: bool = False


@dataclass(frozen=True)
class Recipe:
    """Every parameter of the optimisation; the defaults are the seed recipe."""

    epochs: Annotated[int, Option("Passes over the windows.", min=1)] = 20
    batch_size: Annotated[int, Option("Windows in a step.", min=1)] = 32
    learning_rate: Annotated[float, Option("Peak rate of AdamW.")] = 5e-4
    weight_decay: Annotated[float, Option("Weight decay of AdamW.")] = 0.01
    clip: float = 1.0
    noise: Annotated[float, Option("Length of the noise added to each context vector.")] = 0.0
    drop: Annotated[float, Option("Share of context vectors replaced by the mean of the others.", min=0, max=0.9)] = 0.0
    reverse: Annotated[float, Option("Share of batches read backwards.", min=0, max=1)] = 0.0
    teachers: Annotated[
        tuple[str, ...],
        Option("A version to learn from; repeat for an ensemble.", metavar=ALIAS_OR_VERSION, flag="--teacher"),
    ] = ()
    distil: Annotated[float, Option("Share of the target that comes from the teachers.", min=0, max=1)] = 0.5
    contrast: Annotated[
        float, Option("Weight of InfoNCE, with the batch as wrong answers, beside the squared error.", min=0)
    ] = 0.0
    ema: Annotated[
        float, Option("Decay of the average of weights that is scored and kept; 0: none.", min=0, max=0.99999)
    ] = 0.0
    precision: Annotated[TrainingPrecision, Option("float32, or bf16 for products of matrices in training.")] = (
        "float32"
    )
    schedule: Annotated[Schedule, Option("baseline (plateau) or optimised (warm-up, cosine).")] = "optimised"
    negatives: Annotated[int, Option("Wrong chunks of the same article, for a two-tower.", min=1)] = 3
    seed: Annotated[int, Option("Seed of weights, order, noise and split.")] = 0

    @property
    def is_for_nets_that_predict(self) -> bool:
        """Whether an option is set that only a net has that is trained to predict the next vector."""
        return bool(self.noise or self.drop or self.reverse or self.contrast or self.teachers)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that one run of `lvm train` needs.

    A reranker takes its encoder, context length and articles from its `towers`, and trains on the CPU.
    """

    net: Annotated[
        str,
        Option("amn, gmn, gru, lstm, lstm_stack, mamba or transformer; or reranker.", metavar="NET", is_argument=True),
    ]
    data: Annotated[
        tuple[DataSet, ...],
        Option("A training set; NAME is for the card. Repeat to train on several.", metavar=NAMED_DIR),
    ]
    val: Annotated[tuple[DataSet, ...], Option("A data set to score on, for the card; repeat.", metavar=NAMED_DIR)] = ()
    name: Annotated[str, Option("The model's name; default the net's.")] = ""
    encoder: Annotated[str, Option("The encoder of the data.")] = "all-MiniLM-L6-v2"
    config: Annotated[Mapping[str, Any], Option("JSON of sizes other than the reference's.")] = field(
        default_factory=dict
    )
    recipe: Recipe = field(default_factory=Recipe)
    context_length: Annotated[int, Option("Chunks in a context (T).", min=1)] = 5
    held_out: Annotated[float, Option("Share of the articles held out to choose the epoch.")] = 0.05
    used: Annotated[
        float, Option("Share of the articles that is used, drawn at random; for learning curves.", min=0.001, max=1)
    ] = 1.0
    device: Annotated[str, Option("Any torch device.")] = "cpu"
    run: Annotated[Path | None, Option("File for the state of the run; default runs/NAME.pt.")] = None
    resume: Annotated[bool, Option("Continue from the state in --run.")] = False
    license: Annotated[str, Option("Licence of the data, and so of the net.")] = "cc-by-sa-3.0"
    attribution: Annotated[str, Option("Whom the licence of the data requires to be named.")] = ""
    two_tower: Annotated[bool, Option("Train the net as a query tower, with a payload tower, for retrieval.")] = False
    towers: Annotated[str, Option("The two-tower whose results the reranker orders.", metavar=VERSION)] = ""
    command: str = ""

    @property
    def model(self) -> str:
        """The name of the model that is made."""
        return self.name or self.net

    @property
    def state(self) -> Path:
        """The file that the state of the run is saved to."""
        return self.run or Path("runs") / f"{self.model}.pt"
