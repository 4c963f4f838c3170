"""Forecast a real series, one step and many steps ahead, and compare with simple forecasts.

The series is the electroencephalogram in matplotlib's sample data, four electrodes at once, or
columns of a CSV file of your own. An LSTM and a GRU read it once and forecast at every step all
horizons directly (a readout with one output for each), as a change from the last value. Beside them
stand the last value repeated (naive), the value one period ago (seasonal naive) and a linear
autoregression, whose forecasts are iterated. One model serves all columns, each standardised; the
long form averages the forecasts of five networks.

Training, validation and test part follow each other in time. Mean and deviation, the period, the
autoregression and the scale of the errors are of the training part; the validation part chooses
when to stop; figures are of the test part. The mean absolute scaled error (MASE) is 1 where
forecasts are as far off as the naive one is, one step ahead, in the training part.

Paper: Hyndman and Koehler 2006, Another Look at Measures of Forecast Accuracy. Ben Taieb, Bontempi,
Atiya and Sorjamaa 2012, A Review and Comparison of Strategies for Multi-step Ahead Time Series
Forecasting.

    python examples/forecast.py --hidden 64 --horizon 24
    python examples/forecast.py --csv load.csv --column demand --period 24
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import fastseq

TRAIN, TEST = 6, 7  # tenths: where the training part ends and the test part starts
WARM = 8  # steps that a window is read before its forecasts count
BATCH = 16  # windows, each of all columns
CHECK = 20  # steps of training between two looks at the validation part

LABELS = {
    "naive": "naive",
    "seasonal": "seasonal naive",
    "linear": "autoregression",
    "lstm": "LSTM",
    "gru": "GRU",
}


# The series


def read_csv(path: Path, columns: list[str]) -> Tensor:
    """(T, C) of the named columns. A file that is not as expected ends the script in one line."""
    reader = csv.reader(io.StringIO(common.read(path).removeprefix("\ufeff"), newline=""))
    header = next(reader, [])
    if not header:
        common.stop(f"{path}: expected a header with the columns' names, got an empty line or file")
    for name in columns:
        if name not in header:
            common.stop(f"{path}: no column {name!r}; expected one of {', '.join(header)}")
    places = [header.index(name) for name in columns]
    values = []
    for row in reader:
        if not row:
            continue
        for name, place in zip(columns, places, strict=True):
            text = row[place] if place < len(row) else ""
            try:
                values.append(float(text))
            except ValueError:
                values.append(math.nan)
            if not math.isfinite(values[-1]):
                common.stop(
                    f"{path}: line {reader.line_num}, column {name!r}: expected a number, got "
                    f"{text!r}"
                )
    return torch.tensor(values, dtype=torch.float64).view(-1, len(columns))


def read_eeg() -> Tensor:
    """(800, 4): ten seconds of four electrodes."""
    from matplotlib.cbook import get_sample_data

    try:
        with get_sample_data("eeg.dat") as file:
            data = bytearray(file.read())
    except OSError as error:
        common.stop(
            f"matplotlib's sample data cannot be read: {error}; give --csv FILE --column NAME"
        )
    return torch.frombuffer(data, dtype=torch.float64).view(-1, 4)


class Parts(NamedTuple):
    """A series (T, C) in deviations from the mean of its training part, and its borders."""

    x: Tensor
    train: int  # the training part is x[:train]
    test: int  # the validation part is x[train:test], the test part x[test:]

    def origins(self, part: str, horizon: int) -> Tensor:
        """The steps after which to forecast, so that all that is forecast lies in a part."""
        first, last = {
            "valid": (self.train, self.test),
            "test": (self.test, len(self.x)),
        }[part]
        return torch.arange(first - 1, last - horizon)


def parts_of(series: Tensor, window: int, horizon: int) -> Parts:
    """Mean and deviation are of the training part alone."""
    length = len(series)
    train, test = length * TRAIN // 10, length * TEST // 10
    if train < window + horizon or test - train <= horizon:
        need = max(-(-(window + horizon) * 10 // TRAIN), (horizon + 2) * 10 // (TEST - TRAIN))
        common.stop(
            f"the series has {length} values; expected at least {need} for --window {window} and "
            f"--horizon {horizon}"
        )
    mean, deviation = series[:train].mean(0), series[:train].std(0)
    for column, spread in enumerate(deviation.tolist(), 1):
        if spread == 0:
            common.stop(
                f"column {column} of the series: expected values that differ, got one value "
                f"throughout the training part, its first {train}"
            )
    return Parts(((series - mean) / deviation).float(), train, test)


def future(x: Tensor, origins: Tensor, horizon: int) -> Tensor:
    """(N, horizon, C): what follows each origin."""
    return x[origins[:, None] + torch.arange(1, horizon + 1)]


# Simple forecasts: each returns (N, horizon, C) and knows x up to each origin only


def naive(x: Tensor, origins: Tensor, horizon: int) -> Tensor:
    return x[origins, None].expand(-1, horizon, -1)


def seasonal_naive(x: Tensor, origins: Tensor, horizon: int, period: int) -> Tensor:
    """What stood there one period ago, or as many as lead back to what is known."""
    steps = torch.arange(1, horizon + 1)
    back = (steps + period - 1) // period * period
    return x[origins[:, None] + steps - back]


def period_of(x: Tensor) -> int:
    """The lag of the greatest autocorrelation after it first falls to 0 (or is least), up to a
    third of the length; the mean over the columns."""
    lags = len(x) // 3
    spectrum = torch.fft.rfft(x - x.mean(0), n=2 * len(x), dim=0).abs() ** 2
    correlation = torch.fft.irfft(spectrum, dim=0)[:lags].mean(1)
    fallen = torch.nonzero(correlation <= 0)
    dip = int(fallen[0]) if len(fallen) else int(correlation.argmin())
    return dip + int(correlation[dip:].argmax())


def fit_linear(x: Tensor, order: int) -> Tensor:
    """(C, order + 1): x_t = sum_k a_k x_(t-k) + a_0 by least squares, the nearest lag first and
    the constant last."""
    past = x.unfold(0, order, 1)[:-1].flip(2).transpose(0, 1).double()
    past = torch.cat([past, past.new_ones(*past.shape[:2], 1)], 2)
    return torch.linalg.lstsq(past, x[order:].t()[:, :, None].double()).solution[:, :, 0].float()


def linear(x: Tensor, origins: Tensor, horizon: int, weights: Tensor) -> Tensor:
    """Each forecast is read as if it had been seen, for the next."""
    order = weights.shape[1] - 1
    past = x[origins[:, None] - torch.arange(order)]
    forecasts = []
    for _ in range(horizon):
        forecasts.append((past * weights[:, :-1].t()).sum(1) + weights[:, -1])
        past = torch.cat([forecasts[-1][:, None], past[:, :-1]], 1)
    return torch.stack(forecasts, 1)


# Recurrent forecasts


class Forecaster(nn.Module):
    """Reads value and change at each step, and forecasts all horizons from there."""

    def __init__(self, layer: nn.Module, horizon: int) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, horizon) of (T, B)."""
        change = x.diff(dim=0, prepend=x[:1])
        y, _ = self.layer(torch.stack([x, change], 2))
        return x[:, :, None] + self.readout(y)

    @torch.no_grad()
    def forecasts(self, x: Tensor, origins: Tensor) -> Tensor:
        """(N, horizon, C), after one reading of x."""
        return self(x[: int(origins[-1]) + 1])[origins].transpose(1, 2)


def windows(x: Tensor, length: int) -> Iterator[Tensor]:
    """(length, BATCH C) of x, which start anywhere."""
    spans = x.unfold(0, length, 1)
    while True:
        starts = torch.randint(len(spans), (BATCH,))
        yield spans[starts].flatten(0, 1).t()


def fit(label: str, model: Forecaster, loss, parts: Parts, options, scale: Tensor) -> int:
    """Train, and take the parameters with the least scaled error in the validation part. Returns
    after how many steps they were found."""
    origins = parts.origins("valid", options.horizon)
    truth = future(parts.x, origins, options.horizon)
    best: tuple[float, int, dict] = (math.inf, 0, {})

    def check(step: int) -> None:
        nonlocal best
        square = ((model.forecasts(parts.x, origins) - truth) ** 2).mean((0, 2))
        error = (square / scale).mean().item()
        if error < best[0]:
            best = error, step, {name: value.clone() for name, value in model.state_dict().items()}

    done = common.train(
        label,
        model,
        loss,
        windows(parts.x[: parts.train], options.window + options.horizon),
        steps=options.steps,
        seconds=options.seconds / (2 * options.members),
        optimizer=torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01),
        after=lambda step: None if step % CHECK else check(step),
    )
    check(len(done.losses))
    model.load_state_dict(best[2])
    return best[1]


def errors(forecasts: Tensor, truth: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """MASE and RMSE for each horizon, the means over the columns.

    Args:
        step: (C,) the mean absolute change in a step, in the training part.
    """
    apart = forecasts - truth
    return (apart.abs().mean(0) / step).mean(1), (apart**2).mean(0).sqrt().mean(1)


# What is shown


def plot(forecasts, truth, mase, x: Tensor, origins: Tensor, title: str, out: Path) -> None:
    """Forecasts over a stretch of the first column's test part, and errors by horizon."""
    horizon = truth.shape[1]
    drawn = ("#999999", "#edae49", "#00798c", "#7d5ba6", common.FASTSEQ)
    colours = dict(zip(LABELS, drawn, strict=True))
    figure, (left, right) = common.picture(columns=2, height=4.5)
    chosen = [k * horizon for k in range(4) if k * horizon < len(origins)]
    start, end = int(origins[0]) - horizon, int(origins[chosen[-1]]) + horizon + 1
    left.plot(range(start, end), x[start:end, 0], color="black", linewidth=1, label="truth")
    for name in LABELS:
        for count, k in enumerate(chosen):
            at = int(origins[k])
            line = torch.cat([x[at, :1], forecasts[name][k, :, 0]])
            left.plot(
                range(at, at + horizon + 1),
                line,
                color=colours[name],
                linewidth=1.8 if name in ("lstm", "gru") else 1,
                label=None if count else LABELS[name],
            )
    left.set_title(title, fontsize=11, loc="left")
    left.set_xlabel("step")
    left.set_ylabel("deviations from the mean")
    for name, label in LABELS.items():
        right.plot(range(1, horizon + 1), mase[name], ".-", color=colours[name], label=label)
    right.set_title("Error (MASE) by horizon", fontsize=11, loc="left")
    right.set_xlabel("steps ahead")
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    common.save(figure, out / "forecast.png")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = common.parser(__doc__, seconds=90.0)
    made.add_argument("--csv", type=Path, help="a CSV file with a header, in place of the sample")
    made.add_argument("--column", nargs="+", metavar="NAME", help="of the CSV file")
    made.add_argument("--horizon", type=common.positive, default=16, help="steps to forecast")
    made.add_argument("--window", type=common.positive, default=64, help="steps of a training row")
    made.add_argument("--period", type=common.positive, help="found if left out")
    made.add_argument("--order", type=common.positive, default=8, help="of the autoregression")
    made.add_argument("--hidden", type=common.positive, default=32, help="units of each layer")
    made.add_argument("--layers", type=common.positive, default=1)
    made.add_argument(
        "--members", type=common.positive, default=5, help="networks, whose mean is the forecast"
    )
    made.add_argument("--steps", type=common.positive, default=400, help="of training, each")
    made.add_argument("--lr", type=common.above_zero, default=5e-3)
    options = common.parse(made, argv, {"seconds": 24.0, "members": 1, "steps": 300})
    if (options.csv is None) != (options.column is None):
        made.error("arguments --csv and --column: give both or neither")
    if options.window <= WARM:
        made.error(f"argument --window: expected more than {WARM}, got {options.window}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    horizon = options.horizon
    series = read_csv(options.csv, options.column) if options.csv else read_eeg()
    parts = parts_of(series, options.window, horizon)
    x, known = parts.x, parts.x[: parts.train]
    period = options.period or period_of(known)
    for name, reach in (("period", period), ("order", options.order)):
        if reach > parts.train // 2:
            common.stop(
                f"--{name} {reach}: expected at most {parts.train // 2}, half the training part"
            )
    print(
        f"{len(x)} steps of {x.shape[1]} column{'s' * (x.shape[1] > 1)}: {parts.train} to train, "
        f"{parts.test - parts.train} to validate, {len(x) - parts.test} to test; period {period} "
        f"({'given' if options.period else 'found'})"
    )

    # The naive forecast's mean square error for each horizon: long horizons, whose errors are
    # greater, would rule the loss without it.
    scale = torch.stack([((known[h:] - known[:-h]) ** 2).mean() for h in range(1, horizon + 1)])

    def loss(model: Forecaster, x: Tensor) -> Tensor:
        apart = model(x[:-horizon]) - x[1:].unfold(0, horizon, 1)
        return (apart[WARM:] ** 2 / scale).mean()

    origins = parts.origins("test", horizon)
    truth = future(x, origins, horizon)
    forecasts = {
        "naive": naive(x, origins, horizon),
        "seasonal": seasonal_naive(x, origins, horizon, period),
        "linear": linear(x, origins, horizon, fit_linear(known, options.order)),
    }
    models = {}
    for name in ("lstm", "gru"):
        forecasts[name], steps = torch.zeros_like(truth), []
        for member in range(options.members):
            torch.manual_seed(options.seed + member)
            layer = getattr(fastseq, LABELS[name])
            layer = layer(2, options.hidden, options.layers, backend=options.backend)
            models[name] = Forecaster(layer, horizon)
            label = f"{LABELS[name]} {member + 1}"
            steps.append(fit(label, models[name], loss, parts, options, scale))
            forecasts[name] += models[name].forecasts(x, origins) / options.members
        print(
            f"{LABELS[name]}: the validation part chose {', '.join(map(str, steps))} of "
            f"{options.steps} steps"
        )

    step = known.diff(dim=0).abs().mean(0)
    mase, rmse = {}, {}
    for name, values in forecasts.items():
        mase[name], rmse[name] = errors(values, truth, step)
    shown = sorted({1, 2, 4, 8, horizon} & set(range(1, horizon + 1)))
    print(f"\nMASE, and RMSE in deviations of the training part, of {len(origins)} test origins:\n")
    header = ["", *(f"{h} ahead" for h in shown), "mean", f"RMSE {shown[0]}", f"RMSE {shown[-1]}"]
    rows = [
        [
            label,
            *(f"{mase[name][h - 1]:.3f}" for h in shown),
            f"{mase[name].mean():.3f}",
            f"{rmse[name][0]:.3f}",
            f"{rmse[name][-1]:.3f}",
        ]
        for name, label in LABELS.items()
    ]
    print(common.table(header, rows))
    figures = {f"{name}_one": mase[name][0].item() for name in LABELS}
    figures |= {f"{name}_mean": mase[name].mean().item() for name in LABELS}

    rows = []
    for name, model in models.items():
        batches = windows(known, options.window + horizon)
        found = common.speed(model, loss, batches, seconds=min(options.seconds / 8, 3.0))
        figures[f"{name}_ratio"] = found.ratio
        rows.append(found.row(LABELS[name]))
    print(f"\nMedians of steps in turn, the same batches, {common.threads()}:\n")
    print(common.table(common.SPEEDS, rows))

    title = f"{options.column[0] if options.csv else 'First electrode'}, {horizon} steps ahead"
    plot(forecasts, truth, mase, x, origins, title, options.out)
    print(
        f"One step ahead the MASE is {figures['lstm_one']:.3f} (LSTM) and "
        f"{figures['gru_one']:.3f} (GRU), against {figures['naive_one']:.3f} (naive), "
        f"{figures['seasonal_one']:.3f}\n(seasonal) and {figures['linear_one']:.3f} "
        f"(autoregression); over all {horizon} horizons {figures['lstm_mean']:.3f} and "
        f"{figures['gru_mean']:.3f}, against\n{figures['naive_mean']:.3f}, "
        f"{figures['seasonal_mean']:.3f} and {figures['linear_mean']:.3f}."
    )
    return figures


if __name__ == "__main__":
    common.run(main)
