"""The picture of one step: the latency curve on an axis of nines, and latency over time with the failures."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.plan import Plan
from loadtest.record import Record
from loadtest.report import Columns, Floats

_POINTS = 4000
_BANDS = 60


def draw(path: Path, plan: Plan, record: Record) -> None:
    """Draw the picture of one step as a PNG at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = Columns(plan, record)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _nines(left, columns)
    _over_time(right, columns)
    figure.suptitle(f"{plan.name}: /{plan.route} {plan.wire} x {plan.rows}, {plan.rate:g}/s {plan.arrivals}, open loop")
    figure.savefig(path, dpi=110)


def _nines(axes: Axes, columns: Columns) -> None:
    curves = {
        "latency (from the intended start)": columns.latency_ms,
        "service time (from the write)": columns.service_ms,
    }
    for label, milliseconds in curves.items():
        values = np.sort(milliseconds[columns.good])
        axes.plot(len(values) / (len(values) - np.arange(len(values))), values, label=label, drawstyle="steps-post")
    ticks = [10.0**power for power in range(max(2, len(str(int(columns.good.sum())))))]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 - 100 / tick:.6g} %" for tick in ticks])
    axes.set(title="Percentiles of whole 200 answers", xlabel="percentile", ylabel="time [ms]")
    _dress(axes)


def _over_time(axes: Axes, columns: Columns) -> None:
    at, latency, good = columns.intended, columns.latency_ms, columns.good
    shown = np.flatnonzero(good)[:: max(1, int(good.sum()) // _POINTS)]
    axes.plot(at[shown], latency[shown], ".", markersize=2, alpha=0.3, label="200, one request", color="tab:grey")
    failed = np.flatnonzero(~good)[:: max(1, int((~good).sum()) // _POINTS)]
    if len(failed):
        axes.plot(
            at[failed],
            latency[failed],
            "x",
            markersize=3,
            alpha=0.6,
            label="not a good answer",
            color="tab:red",
        )
    _bands(axes, at[good], latency[good])
    axes.set(title="Latency over time", xlabel="intended start [s]", ylabel="latency [ms]")
    axes.set_ylim(bottom=0)
    _dress(axes)


def _bands(axes: Axes, at: Floats, latency: Floats) -> None:
    if not len(at):
        return
    slots = np.minimum((at / (at.max() + 1e-9) * _BANDS).astype(int), _BANDS - 1)
    filled = np.unique(slots)
    middles = [float(at[slots == slot].mean()) for slot in filled]
    for percentile, colour in ((50, "tab:blue"), (99, "tab:orange")):
        values = [float(np.percentile(latency[slots == slot], percentile)) for slot in filled]
        axes.plot(middles, values, color=colour, linewidth=1.4, label=f"p{percentile} of a slot")


def _dress(axes: Axes) -> None:
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
