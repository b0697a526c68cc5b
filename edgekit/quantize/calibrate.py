"""The range of every activation: histograms over the calibration images, and four ways to cut them.

Values beyond a range are clipped, and a narrower range has finer steps. min-max clips nothing of what was seen;
percentile clips a ten-thousandth of it; mse weighs clipped against rounded values by their squared error (Choukroun et
al., 2019, arXiv:1902.06822); entropy keeps the distribution (Migacz, "8-bit inference with TensorRT", GTC 2017).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy
import onnx
import onnxruntime
import torch
from torch import Tensor

from edgekit.quantize.scheme import Format

BINS = 2048
PERCENTILE = 0.9999  # of the values lie inside, the rest shared by both ends
SHARES = numpy.geomspace(1, 1 / 32, 80)  # of what was seen: the ranges that a search tries


@dataclass(frozen=True)
class Histogram:
    """counts (BINS,): how many values fell into each of as many equal parts of [low, high], the extremes seen."""

    low: float
    high: float
    counts: numpy.ndarray

    @property
    def centres(self) -> numpy.ndarray:
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (numpy.arange(len(self.counts)) + 0.5)


def answers(
    model: onnx.ModelProto, tensors: Iterable[str], images: Tensor, batch: int = 64
) -> Iterator[dict[str, numpy.ndarray]]:
    """The values of `tensors` while the fp32 `model` answers `images` (N, C, H, W), one batch after the other."""
    names = list(tensors)
    if not names:
        return  # a session without outputs cannot be asked
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = opened(probe)
    for chunk in images.split(batch):
        given = {probe.graph.input[0].name: chunk.contiguous().numpy()}
        yield dict(zip(names, map(numpy.asarray, session.run(names, given)), strict=True))


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime, with torch's number of threads: sums depend on it in their last bits."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ranges(
    model: onnx.ModelProto, tensors: Iterable[str], images: Tensor, batch: int = 64
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each of `tensors` while the fp32 `model` answers `images` (N, C, H, W)."""
    found: dict[str, tuple[float, float]] = {}
    for values in answers(model, tensors, images, batch):
        for name, array in values.items():
            low, high = found.get(name, (numpy.inf, -numpy.inf))
            found[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return found


def histograms(
    model: onnx.ModelProto, ends: dict[str, tuple[float, float]], images: Tensor, batch: int = 64
) -> dict[str, Histogram]:
    """The histogram of each tensor between its `ends`, which `ranges` found over the same images."""
    counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in ends}
    for values in answers(model, ends, images, batch):
        for name, array in values.items():
            low, high = ends[name]
            if low < high:  # in float32 and by comparison, histc counts as numpy.histogram does up to the edges' bits
                flat = torch.from_numpy(array).flatten()
                counts[name] += torch.histc(flat, BINS, low, high).to(torch.int64)
    return {name: Histogram(*ends[name], counts[name].numpy()) for name in ends}


# Ways to cut a histogram ----------------------------------------------------------------------------------------------

Method = Callable[[Histogram, Format], tuple[float, float]]


def extremes(seen: Histogram, stored: Format) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high


def percentile(seen: Histogram, stored: Format) -> tuple[float, float]:
    """As much at each end is left out as half of what PERCENTILE leaves; a bin's values are spread over it evenly."""
    total = numpy.concatenate([[0], seen.counts.cumsum()])
    edges = numpy.linspace(seen.low, seen.high, len(seen.counts) + 1)
    share = (1 - PERCENTILE) / 2 * total[-1]
    low, high = (float(numpy.interp(at, total, edges)) for at in (share, total[-1] - share))
    return low, high


def mse(seen: Histogram, stored: Format) -> tuple[float, float]:
    """The range of least mean squared error."""
    return _search(seen, lambda low, high: squared_error(seen, stored, low, high))


def entropy(seen: Histogram, stored: Format) -> tuple[float, float]:
    """The range in which the rounded distribution tells least apart from the one that was seen."""
    return _search(seen, lambda low, high: divergence(seen, stored, low, high))


METHODS: dict[str, Method] = {"min-max": extremes, "percentile": percentile, "mse": mse, "entropy": entropy}


def squared_error(seen: Histogram, stored: Format, low: float, high: float) -> float:
    """Mean squared error of the values, each in the middle of its bin, on the grid over [low, high]."""
    (scale, zero), (least, most) = stored.grid(low, high), stored.ends
    step = float(scale)
    integers = numpy.clip(numpy.rint(seen.centres / step) + int(zero), least, most) - int(zero)
    return float((seen.counts * (integers * step - seen.centres) ** 2).sum() / max(1, seen.counts.sum()))


def divergence(seen: Histogram, stored: Format, low: float, high: float) -> float:
    """KL(clipped || rounded) in nats of the histogram on the grid over [low, high].

    clipped: what lies outside is counted in the outermost bins inside. rounded: of what lies inside alone, the bins
    that share an integer share its count evenly, empty ones excepted.
    """
    (scale, zero), (least, most) = stored.grid(low, high), stored.ends
    counts = seen.counts.astype(numpy.float64)
    if seen.low <= 0 <= seen.high:
        # Zeros, half of what a ReLU makes, cost nothing on a grid that holds zero; in one bin with their neighbours
        # they would look smeared, the less the narrower the range. The next bin stands for those neighbours.
        at = min(int(-seen.low / (seen.high - seen.low) * len(counts)), len(counts) - 1) if seen.high > seen.low else 0
        counts[at] = min(counts[at], counts[at + 1 if at + 1 < len(counts) else at - 1])
    integers = numpy.rint(seen.centres / float(scale)).astype(numpy.int64) + int(zero)
    inside = numpy.flatnonzero((integers >= least) & (integers <= most))
    if not len(inside):
        return numpy.inf
    kept = counts[inside]
    clipped = kept.copy()
    clipped[0] += counts[: inside[0]].sum()
    clipped[-1] += counts[inside[-1] + 1 :].sum()
    level = integers[inside] - least
    sums = numpy.bincount(level, kept)
    filled = numpy.bincount(level, kept > 0)
    rounded = numpy.where(kept > 0, (sums / numpy.maximum(filled, 1))[level], 0)
    if not rounded.sum():
        return numpy.inf
    p, q = clipped / clipped.sum(), rounded / rounded.sum()
    here = p > 0
    # Where only what was clipped counts, the rounded histogram has nothing: a small number keeps the logarithm finite.
    return float((p[here] * numpy.log(p[here] / numpy.maximum(q[here], 1e-9))).sum())


def _search(seen: Histogram, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The cheapest range: both ends drawn in alike, then each by itself; of equals the widest."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        return min(candidates, key=lambda ends: cost(*ends))

    if low < 0 < high:
        both = best([(low * share, high * share) for share in SHARES])
        upper = best([both, *((both[0], high * share) for share in SHARES)])
        return best([upper, *((low * share, upper[1]) for share in SHARES)])
    return best([(low * share, high * share) for share in SHARES])
