"""A generator of the impression -> click -> conversion funnel, with known true probabilities.

A session (``search_id``) is one user who is shown 10 to 40 items. Users and items have latent
vectors; what a model sees are noisy, partly non-linear views of them in the AliExpress layout: 16
categorical fields (9 of the user, 7 of the item, 5 to 100 values, long-tailed) and 63 numerical
ones (23 and 40, some of them pure noise). Clicks follow from the user's and the item's general
appeal, from their affinity (a product of latents, which no linear model has) and from how close
two latents are; conversions after a click follow from the affinity again, from a price that
clicks do not mind, and from an interaction of their own.

Accidental clicks. An impression is clicked if its relevance says so (probability ``p_click_true``)
or by accident (probability q, the same for every impression and independent of everything). A click
that is an accident alone never converts. q is set so that the expected share of such clicks among
all clicks is P: relevant clicks and conversions stay as they are, and the CTR grows by 1 / (1 - P);
with P = 0.3 a CTR of 10% becomes 14.3%.

Rows come in chunks, each from a generator seeded by (seed, chunk): memory does not grow with the
number of impressions, row i is the same whatever their number, and features and relevance are the
same whatever P.

Shape suffixes: N rows, S sessions, K latents.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datasets.errors import TableError
from datasets.filesystem import locate, refuse_existing
from datasets.manifest import Manifest
from datasets.preparation import prepare
from datasets.progress import ReportProgress, report_nothing
from datasets.schema import SplitFractions
from datasets.sources.aliexpress import NUM_CATEGORICALS, NUM_NUMERICALS, aliexpress_schema
from datasets.table_reader import RawBatch

__all__ = ["PRESETS", "TRUTH_COLUMNS", "Preset", "SyntheticRows", "synthesize"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Preset:
    """The rates of a dataset, without accidental clicks, as shares of its impressions."""

    ctr: float
    ctcvr: float


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "demo": Preset(ctr=0.10, ctcvr=0.028),
        "fr": Preset(ctr=542_753 / 27_035_601, ctcvr=14_430 / 27_035_601),
        "nl": Preset(ctr=381_078 / 17_717_195, ctcvr=13_815 / 17_717_195),
        "us": Preset(ctr=449_608 / 27_392_613, ctcvr=10_830 / 27_392_613),
        "ccp": Preset(ctr=3_317_703 / 85_316_519, ctcvr=17_167 / 85_316_519),
    }
)
"""``demo`` has conversions enough for a small dataset; the others have public datasets' rates."""

TRUTH_COLUMNS = ("p_click_true", "p_click", "p_conversion")
"""Kept under ``truth/``: of a relevant click, of any click, of a conversion, per impression."""

_CHUNK_ROWS = 32_768
_CALIBRATION_CHUNKS = 2
_SESSION_ROWS = (10, 40)
_LATENTS = 6
_USER_CATEGORICALS = 9
_USER_NUMERICALS = 23
_CARDINALITIES = (5, 12, 100, 8, 40, 20, 6, 60, 30, 100, 16, 80, 10, 50, 24, 70)
_CATEGORICAL_FIDELITY = 0.9
_NUMERICAL_FIDELITY = 0.85


@dataclass(frozen=True)
class _Chunk:
    """The rows of a chunk before labels: features, and the logits but for their intercepts."""

    columns: dict[str, Any]
    click_logit_N: Array
    conversion_logit_N: Array
    draws_3N: Array


class _World:
    """What is fixed for a seed: how latents show in features, and what users like."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        generator = np.random.default_rng([seed, 0])
        self._category_directions = _directions(generator, NUM_CATEGORICALS)
        self._number_directions = _directions(generator, NUM_NUMERICALS)
        self._permutations = [generator.permutation(size) for size in _CARDINALITIES]

    def chunk(self, index: int) -> _Chunk:
        """Generate all rows of one chunk; calibration chunks have an index below zero."""
        stream = [self._seed, 1, index] if index >= 0 else [self._seed, 2, -index]
        generator = np.random.default_rng(stream)
        low, high = _SESSION_ROWS
        lengths = generator.integers(low, high + 1, size=-(-_CHUNK_ROWS // low))
        session_N = np.repeat(np.arange(len(lengths)), lengths)[:_CHUNK_ROWS]
        user_SK = generator.standard_normal((int(session_N[-1]) + 1, _LATENTS))
        item_NK = generator.standard_normal((_CHUNK_ROWS, _LATENTS))
        columns: dict[str, Any] = {"search_id": session_N + max(index, 0) * _CHUNK_ROWS}
        for field in range(NUM_CATEGORICALS):
            of_user = field < _USER_CATEGORICALS
            latent = user_SK if of_user else item_NK
            values = self._category(generator, field, latent)
            columns[f"categorical_{field + 1}"] = values[session_N] if of_user else values
        for field in range(NUM_NUMERICALS):
            of_user = field < _USER_NUMERICALS
            latent = user_SK if of_user else item_NK
            numbers = self._number(generator, field, latent)
            columns[f"numerical_{field + 1}"] = numbers[session_N] if of_user else numbers
        click_N, conversion_N = _logits(user_SK[session_N], item_NK)
        return _Chunk(columns, click_N, conversion_N, generator.random((3, _CHUNK_ROWS)))

    def _category(
        self, generator: np.random.Generator, field: int, latent: Array
    ) -> npt.NDArray[np.int64]:
        """Cut a noisy direction of the latents into long-tailed bins with shuffled names."""
        noise = generator.standard_normal(len(latent))
        view = _noisy(latent @ self._category_directions[field], noise, _CATEGORICAL_FIDELITY)
        size = _CARDINALITIES[field]
        quantile = _sigmoid(1.702 * view)  # near enough to the normal distribution function
        bins = np.minimum((quantile**1.5 * size).astype(np.int64), size - 1)
        named: npt.NDArray[np.int64] = self._permutations[field][bins]
        return named

    def _number(
        self, generator: np.random.Generator, field: int, latent: Array
    ) -> npt.NDArray[np.float32]:
        """Show a noisy direction of the latents through one of seven shapes, noise among them."""
        noise = generator.standard_normal(len(latent))
        view = _noisy(latent @ self._number_directions[field], noise, _NUMERICAL_FIDELITY)
        shapes: Sequence[Any] = (
            lambda: view,
            lambda: np.exp(0.7 * view),
            lambda: np.tanh(1.5 * view),
            lambda: np.maximum(view, 0.0),
            lambda: view**2,
            lambda: np.round(3.0 * _sigmoid(1.7 * view), 1),
            lambda: noise,
        )
        shown: npt.NDArray[np.float32] = shapes[field % len(shapes)]().astype(np.float32)
        return shown


def _directions(generator: np.random.Generator, count: int) -> Array:
    """Return unit vectors, each along one latent with a share of the others."""
    directions = 0.35 * generator.standard_normal((count, _LATENTS))
    directions[np.arange(count), np.arange(count) % _LATENTS] += 1.0
    unit: Array = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return unit


def _noisy(signal: Array, noise: Array, fidelity: float) -> Array:
    return fidelity * signal + math.sqrt(1.0 - fidelity**2) * noise


def _sigmoid(values: Array) -> Array:
    result: Array = 0.5 * (1.0 + np.tanh(0.5 * values))
    return result


def _logits(user_NK: Array, item_NK: Array) -> tuple[Array, Array]:
    """Return the logits of a relevant click, and of a conversion after it, without intercepts."""
    affinity = user_NK[:, 0] * item_NK[:, 0] + 0.7 * user_NK[:, 1] * item_NK[:, 1]
    closeness = -np.abs(user_NK[:, 2] - item_NK[:, 2])
    quality = item_NK[:, 3]
    click = 1.3 * affinity + 1.2 * closeness + 1.1 * quality + 0.7 * user_NK[:, 3]
    price = item_NK[:, 4]
    spending = np.minimum(user_NK[:, 4], 1.0)
    conversion = 1.0 * affinity + 1.2 * spending * price - 0.9 * price + 0.6 * user_NK[:, 5]
    return click, conversion + 0.4 * np.tanh(item_NK[:, 5]) + 0.3 * quality


class SyntheticRows:
    """The rows of a synthetic dataset; reading them again gives the same.

    Args:
        preset: The rates.
        num_impressions: How many rows.
        seed: Another seed gives another world and other rows.
        accidental_clicks: The expected share of clicks that are accidents, from 0 up to below 1.
    """

    def __init__(
        self, preset: Preset, *, num_impressions: int, seed: int, accidental_clicks: float
    ) -> None:
        self.name = "synthetic rows"
        self.columns: Sequence[str] = aliexpress_schema(SplitFractions()).columns
        self._num_impressions = num_impressions
        self._world = _World(seed)
        share = accidental_clicks
        self._accident = preset.ctr * share / ((1.0 - share) * (1.0 - preset.ctr))
        samples = [self._world.chunk(-1 - index) for index in range(_CALIBRATION_CHUNKS)]
        click_N = np.concatenate([sample.click_logit_N for sample in samples])
        conversion_N = np.concatenate([sample.conversion_logit_N for sample in samples])
        self._click_intercept = _intercept(click_N, np.ones_like(click_N), preset.ctr)
        p_click_N = _sigmoid(click_N + self._click_intercept)
        self._conversion_intercept = _intercept(conversion_N, p_click_N, preset.ctcvr)

    def batches(self) -> Iterator[RawBatch]:
        """Generate all rows, chunk by chunk."""
        for index in range(-(-self._num_impressions // _CHUNK_ROWS)):
            start = index * _CHUNK_ROWS
            batch = pa.table(self._label(self._world.chunk(index)))
            yield RawBatch(start + 1, batch.slice(0, self._num_impressions - start))

    def _label(self, chunk: _Chunk) -> dict[str, Any]:
        p_relevant_N = _sigmoid(chunk.click_logit_N + self._click_intercept)
        p_after_N = _sigmoid(chunk.conversion_logit_N + self._conversion_intercept)
        relevant_N = chunk.draws_3N[0] < p_relevant_N
        converted_N = relevant_N & (chunk.draws_3N[1] < p_after_N)
        clicked_N = relevant_N | (chunk.draws_3N[2] < self._accident)
        truth = (
            p_relevant_N,
            p_relevant_N + (1.0 - p_relevant_N) * self._accident,
            p_relevant_N * p_after_N,
        )
        return {
            **chunk.columns,
            "click": clicked_N.astype(np.uint8),
            "conversion": converted_N.astype(np.uint8),
            **dict(zip(TRUTH_COLUMNS, truth, strict=True)),
        }


def _intercept(logit_N: Array, weight_N: Array, rate: float) -> float:
    """Find b such that mean(weight * sigmoid(logit + b)) is the rate, by bisection."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if float(np.mean(weight_N * _sigmoid(logit_N + middle))) < rate:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def synthesize(
    *,
    out: str | Path,
    impressions: int,
    preset: str = "demo",
    seed: int = 0,
    accidental_clicks: float = 0.0,
    report: ReportProgress = report_nothing,
) -> Manifest:
    """Make a synthetic dataset; 10% of the sessions are valid and 10% test.

    The true probabilities lie beside the data, in ``truth/<split>/part-*.parquet``, row by row.

    Args:
        out: The directory or URI to make; it must not exist.
        impressions: The number of rows of all splits together.
        preset: A name among ``PRESETS``.
        seed: Another seed gives another world and other rows.
        accidental_clicks: The expected share of all clicks that are accidents, from 0 to below 1;
            the CTR grows by 1 / (1 - share).
        report: Told how far the preparation is.

    Raises:
        TableError: An argument is out of range, or so few impressions that a split is empty.
        OutputExistsError: Something lies at ``out``.
    """
    refuse_existing(locate(out), shown=str(out))
    if preset not in PRESETS:
        raise TableError(f"--preset {preset}: unknown; known: {', '.join(PRESETS)}")
    if impressions < 1:
        raise TableError(f"--impressions {impressions}: must be at least 1")
    if seed < 0:
        raise TableError(f"--seed {seed}: must not be negative")
    rates = PRESETS[preset]
    if not 0.0 <= accidental_clicks < 1.0 or accidental_clicks > 1.0 - rates.ctr:
        raise TableError(
            f"--accidental-clicks {accidental_clicks:g}: must be from 0 to {1 - rates.ctr:.3g} for "
            f"preset {preset}"
        )
    rows = SyntheticRows(
        rates, num_impressions=impressions, seed=seed, accidental_clicks=accidental_clicks
    )
    return prepare(
        aliexpress_schema(SplitFractions(valid=0.1, test=0.1, seed=0)),
        {"train": rows},
        out=out,
        source=(
            f"synthetic, preset {preset}, {impressions} impressions, seed {seed}, "
            f"accidental clicks {accidental_clicks:g}"
        ),
        truth=TRUTH_COLUMNS,
        report=report,
    )
