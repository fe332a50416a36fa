"""The picture of one step: the latency curve on an axis of nines, and latency over time with the failures.

`canvas`, `dress` and `save` make every picture of the load tester and of the bench look alike.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest import report
from loadtest.plan import Plan
from loadtest.record import Record
from loadtest.samples import Floats, Samples

_POINTS = 4000
_BANDS = 60


def canvas() -> Figure:
    """Return an empty picture."""
    picture = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def dress(axes: Axes) -> None:
    """Give axes a grid, and a legend if they have labels."""
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def save(picture: Figure, path: Path) -> None:
    """Write a picture as a PNG; its directory is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for axes in picture.axes:
        dress(axes)
    picture.savefig(path, dpi=110)


def draw(path: Path, plan: Plan, record: Record) -> None:
    """Draw the picture of one step as a PNG at `path`."""
    samples = report.measured(plan, record)
    picture = canvas()
    left, right = picture.subplots(1, 2)
    _nines(left, samples)
    _over_time(right, samples, record.start + plan.warmup)
    picture.suptitle(f"{plan.name}: /{plan.route} {plan.wire} x {plan.rows}, {report.load_of(plan.echo())}")
    save(picture, path)


def _nines(axes: Axes, samples: Samples) -> None:
    curves = {
        "latency (from the intended start)": samples.latency_ms,
        "service time (from the write)": samples.service_ms,
    }
    for label, milliseconds in curves.items():
        values = np.sort(milliseconds[samples.good])
        axes.plot(len(values) / (len(values) - np.arange(len(values))), values, label=label, drawstyle="steps-post")
    ticks = [10.0**power for power in range(max(2, len(str(int(samples.good.sum())))))]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 - 100 / tick:.6g} %" for tick in ticks])
    axes.set(title="Percentiles of whole 200 answers", xlabel="percentile", ylabel="time [ms]")


def _over_time(axes: Axes, samples: Samples, begin: float) -> None:
    at = samples.intended - begin
    latency = samples.latency_ms
    good = samples.good
    shown = np.flatnonzero(good)[:: max(1, int(good.sum()) // _POINTS)]
    axes.plot(at[shown], latency[shown], ".", markersize=2, alpha=0.3, label="200, one request", color="tab:grey")
    failed = np.flatnonzero(~good)[:: max(1, int((~good).sum()) // _POINTS)]
    if len(failed):
        axes.plot(at[failed], latency[failed], "x", markersize=3, alpha=0.6, label="not a good answer", color="tab:red")
    _bands(axes, at[good], latency[good])
    axes.set(title="Latency over time", xlabel="intended start [s]", ylabel="latency [ms]")
    axes.set_ylim(bottom=0)


def _bands(axes: Axes, at: Floats, latency: Floats) -> None:
    if not len(at):
        return
    slots = np.minimum((at / (at.max() + 1e-9) * _BANDS).astype(int), _BANDS - 1)
    filled = np.unique(slots)
    middles = [float(at[slots == slot].mean()) for slot in filled]
    for percentile, colour in ((50, "tab:blue"), (99, "tab:orange")):
        values = [float(np.percentile(latency[slots == slot], percentile)) for slot in filled]
        axes.plot(middles, values, color=colour, linewidth=1.4, label=f"p{percentile} of a slot")
