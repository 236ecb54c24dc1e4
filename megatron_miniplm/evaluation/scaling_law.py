"""Scaling laws: fits of losses to what they cost, how sure they are, and what follows from them.

The paper (arXiv 2410.17215, appendix C.1) has two forms of one law, a limit and a term an axis::

    L(N, D) = L_irr + A_m / N^alpha_m + A_d / D^alpha_d          Eq. 15: parameters and tokens
    L(C)    = L_inf + A_c / C^alpha_c                            Eq. 16: compute, of one model size

Fit as by Hoffmann et al. (arXiv 2203.15556, approach 3): the Huber loss (delta 1e-3) of
``log L(x) - log L_seen`` with ``log L(x) = logsumexp(log A - alpha log x, ..., log L_inf)``,
L-BFGS from a grid of starts, the best kept. A and alpha of one axis are almost collinear: compare
losses between laws, never amplitudes.

Intervals are of a residual bootstrap in blocks, since neighbouring points of a run err together.
They say what noise does to the fit, not whether the law holds where nothing was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from megatron_miniplm.core.errors import DataError

Array = npt.NDArray[np.float64]

DELTA = 1e-3
"""Where the Huber loss turns from square to absolute, in log loss."""
_EXPONENTS = (0.2, 0.5, 1.0)
_LIMITS = (0.5, 0.85, 0.97)
"""The grid of starts: exponents of every axis, limits as shares of the lowest loss."""
_EXPONENT_BOUNDS = (1e-4, 4.0)


@dataclass(frozen=True, kw_only=True)
class Term:
    """``amplitude / x ** exponent``."""

    amplitude: float
    exponent: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """``limit`` and the terms of one (Eq. 16) or more axes (Eq. 15); nats a token."""

    limit: float
    """Loss that nothing on the axes goes below: L_inf, L_irr."""
    terms: tuple[Term, ...]

    def loss(self, *at: float) -> float:
        """Loss at one number an axis."""
        return self.limit + math.fsum(
            term.amplitude * x**-term.exponent for term, x in zip(self.terms, at, strict=True)
        )

    def needed(self, loss: float) -> float:
        """What a law of one axis takes to that loss; infinite at its limit and below."""
        (term,) = self.terms
        if loss <= self.limit:
            return math.inf
        with np.errstate(divide="ignore", over="ignore"):  # what no float64 holds is 0 or infinite
            log = (np.log(term.amplitude) - np.log(loss - self.limit)) / term.exponent
            return float(np.exp(log))


def compute_ratio(law: Law, other: Law, *, at: float) -> float:
    """How many times less `law` takes to where `other` gets with `at`: 2.15, say.

    0 where it never gets there, infinite where it starts below.
    """
    needed = law.needed(other.loss(at))
    return at / needed if needed else math.inf


def unique_tokens(law: Law, loss: float, *, repeats: float = 1) -> float:
    """Tokens that must exist to reach a loss, where each is trained on `repeats` times.

    The data-constrained reading of Eq. 15 (arXiv 2410.17215, appendix C.2): up to 4 passes count as
    fresh data, N_d = 4 x unique tokens. The 118 billion that the paper derives from it do not
    follow from its Table 8: see docs/costs.md.
    """
    return law.needed(loss) / repeats


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law, what it was fitted to, and the laws of resampled data."""

    law: Law
    residuals: Array
    """log of (fitted / seen) loss."""
    resampled: Sequence[Law]

    def interval(self, value: Callable[[Law], float]) -> tuple[float, float]:
        """Between which values of any function of the law 95 % of the resamples lie."""
        return _central([value(law) for law in self.resampled] or [value(self.law)])

    def interval_beside(
        self, other: Fit, value: Callable[[Law, Law], float]
    ) -> tuple[float, float]:
        """The same of a function of two laws, each resampled on its own."""
        pairs = list(zip(self.resampled, other.resampled, strict=True))
        return _central([value(*pair) for pair in pairs or [(self.law, other.law)]])


def _central(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def fit(
    at: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    resamples: int = 0,
    block: int = 3,
    seed: int = 0,
) -> Fit:
    """Fit a law to points [n] (Eq. 16) or [n, axes] (Eq. 15) and their losses [n].

    `resamples`: refits for intervals, on residuals redrawn in runs of `block` neighbours. Refuses
    points that cannot tell the parameters apart, and values that have no logarithm.
    """
    data = _Points.checked(np.asarray(at, np.float64), np.asarray(loss, np.float64))
    theta = data.best()
    residuals = data.predicted(theta) - data.log_loss
    rng = np.random.default_rng(seed)
    # Residuals of a fit are smaller than the errors were, by what its parameters took up.
    wide = residuals * math.sqrt(len(residuals) / (len(residuals) - len(theta)))
    laws = []
    for _ in range(resamples):
        again = data.with_loss(data.predicted(theta) - _blocks(wide, block, rng))
        laws.append(again.law(again.polished(theta)))
    return Fit(law=data.law(theta), residuals=residuals, resampled=laws)


def _blocks(values: Array, block: int, rng: np.random.Generator) -> Array:
    """As many values, in circular runs of `block` neighbours from random places."""
    starts = rng.integers(len(values), size=-(-len(values) // block))
    places = (starts[:, None] + np.arange(block)) % len(values)
    return values[places.ravel()[: len(values)]]


@dataclass(frozen=True)
class _Points:
    """What is fitted: parameters are (log A, alpha) of every axis at its centre, then log limit.

    Centred logarithms keep amplitude and exponent apart, or no optimizer gets far.
    """

    log_x: Array
    """[n, axes], less `centre`."""
    centre: Array
    log_loss: Array

    @classmethod
    def checked(cls, at: Array, loss: Array) -> _Points:
        x = at[:, None] if at.ndim == 1 else at
        count, axes = x.shape
        if len(loss) != count:
            raise DataError(f"{count} points, but {len(loss)} losses: give one for each")
        if not ((x > 0) & np.isfinite(x)).all() or not ((loss > 0) & np.isfinite(loss)).all():
            raise DataError("a law is fitted to logarithms: points and losses must be above 0")
        parameters = 2 * axes + 1
        different = min(len(np.unique(column)) for column in x.T)
        if count <= parameters or different < 3:
            raise DataError(
                f"{parameters} parameters need more than {parameters} points with at least 3 "
                f"different values on every axis, but there are {count} with {different}: "
                "validate more often, or give more runs"
            )
        log_x = np.log(x)
        return cls(log_x - log_x.mean(axis=0), log_x.mean(axis=0), np.log(loss))

    def with_loss(self, log_loss: Array) -> _Points:
        return _Points(self.log_x, self.centre, log_loss)

    def parts(self, theta: Array) -> Array:
        """Logarithms of the terms and of the limit, [n, axes + 1]."""
        amplitudes, exponents = theta[:-1:2], theta[1::2]
        terms = amplitudes - exponents * self.log_x
        return np.column_stack([terms, np.full(len(terms), theta[-1])])

    def predicted(self, theta: Array) -> Array:
        return np.asarray(np.logaddexp.reduce(self.parts(theta), axis=1))

    def jacobian(self, theta: Array) -> Array:
        """Of the predicted log loss, [n, parameters]."""
        parts = self.parts(theta)
        shares = np.exp(parts - np.logaddexp.reduce(parts, axis=1)[:, None])
        columns = np.empty((len(shares), len(theta)))
        columns[:, :-1:2], columns[:, -1] = shares[:, :-1], shares[:, -1]
        columns[:, 1::2] = -shares[:, :-1] * self.log_x
        return columns

    def huber(self, theta: Array) -> tuple[float, Array]:
        """The sum of Huber losses in units of delta squared, and its gradient."""
        error = (self.predicted(theta) - self.log_loss) / DELTA
        size = np.abs(error)
        value = np.where(size <= 1, error**2 / 2, size - 0.5).sum()
        return float(value), np.clip(error, -1, 1) @ self.jacobian(theta) / DELTA

    def best(self) -> Array:
        """The best end of L-BFGS from the grid, then polished."""
        ends = [
            optimize.minimize(
                self.huber, start, jac=True, method="L-BFGS-B", bounds=self.bounds(),
                options={"maxiter": 100},
            )
            for start in self.starts()
        ]  # fmt: skip
        return self.polished(min(ends, key=lambda end: end.fun).x)

    def polished(self, theta: Array) -> Array:
        """From near the optimum to it: L-BFGS stops some digits short in a narrow valley."""
        low, high = (np.array(side) for side in zip(*self.bounds(), strict=True))
        start = np.clip(theta, low, high)  # a resample's highest loss may be below the fit's limit
        end = optimize.least_squares(
            lambda theta: self.predicted(theta) - self.log_loss, start, jac=self.jacobian,
            bounds=(low, high), loss="huber", f_scale=DELTA, xtol=1e-9, ftol=1e-9, gtol=1e-9,
            max_nfev=50,  # a law takes 4; losses that follow none have no optimum worth more
        )  # fmt: skip
        return np.asarray(end.x)

    def bounds(self) -> list[tuple[float, float]]:
        axes = self.log_x.shape[1]
        return [(-np.inf, np.inf), _EXPONENT_BOUNDS] * axes + [(-np.inf, self.log_loss.max())]

    def starts(self) -> list[Array]:
        """Of every combination of exponents and limit; the axes share what is above the limit."""
        axes, losses = self.log_x.shape[1], np.exp(self.log_loss)
        grid = []
        for limit, *exponents in itertools.product(_LIMITS, *[_EXPONENTS] * axes):
            above = math.log((np.median(losses) - limit * losses.min()) / axes)
            pairs = itertools.chain.from_iterable((above, exponent) for exponent in exponents)
            grid.append(np.array([*pairs, math.log(limit * losses.min())]))
        return grid

    def law(self, theta: Array) -> Law:
        """With the amplitudes at x = 1."""
        pairs = zip(theta[:-1:2], theta[1::2], self.centre, strict=True)
        terms = (
            Term(amplitude=float(np.exp(a + alpha * centre)), exponent=float(alpha))
            for a, alpha, centre in pairs
        )
        return Law(limit=float(np.exp(theta[-1])), terms=tuple(terms))


def _eq16(amplitude: float, exponent: float, limit: float) -> Law:
    return Law(limit=limit, terms=(Term(amplitude=amplitude, exponent=exponent),))


PAPER: Mapping[str, Mapping[str, Law]] = {
    "200m": {
        "pretrain": _eq16(2.19e7, 0.41, 3.30),
        "vanilla-kd": _eq16(9.77e7, 0.44, 3.34),
        "miniplm": _eq16(8.56e10, 0.59, 3.25),
    },
    "500m": {
        "pretrain": _eq16(2.73e8, 0.45, 3.06),
        "vanilla-kd": _eq16(3.14e8, 0.45, 3.05),
        "miniplm": _eq16(6.64e9, 0.52, 3.03),
    },
    "1.2b": {
        "pretrain": _eq16(1.88e8, 0.43, 2.91),
        "vanilla-kd": _eq16(1.10e10, 0.52, 2.90),
        "miniplm": _eq16(4.29e8, 0.45, 2.86),
    },
}
"""Table 8 of arXiv 2410.17215: loss on DCLM's text against FLOPs, by student and method."""
PAPER_COMPUTE_1T: Mapping[str, float] = {"200m": 1.26e21, "500m": 3.14e21, "1.2b": 7.30e21}
"""Table 8's C_1T: 6 N D with D = 2 million updates of 524,288 tokens, and N = 1.16 billion for
the largest. Ten times as much is C_10T. The table prints that for the 200M student alone: in the
rows of the other two it repeats C_1T, which must be a misprint, since Table 2 follows from ten
times as much."""
