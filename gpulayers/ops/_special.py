"""Special functions that neither NumPy nor CuPy's core has, written with names that both have."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import namespace

# W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of Computation 23 (1969), 631–637,
# with the coefficients of his program CALERF; highest power first.
_NEAR = (
    (
        1.85777706184603153e-1,
        3.16112374387056560e0,
        1.13864154151050156e2,
        3.77485237685302021e2,
        3.20937758913846947e3,
    ),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
_MIDDLE = (
    (
        *(2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1),
        *(2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3),
        1.23033935479799725e3,
    ),
    (
        *(1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3),
        *(3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
    ),
)
_FAR = (
    (
        *(1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1),
        *(1.60837851487422766e-2, 6.58749161529837803e-4),
    ),
    (
        *(1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1),
        *(6.05183413124413191e-2, 2.33520497626869185e-3),
    ),
)
_ONE_OVER_SQRT_PI = 5.6418958354775628695e-1


def _ratio(x: Any, coefficients: tuple) -> Any:
    """P(x) / Q(x) by Horner's rule."""
    values = []
    for row in coefficients:
        value = row[0]
        for c in row[1:]:
            value = value * x + c
        values.append(value)
    return values[0] / values[1]


def erf(x: Any) -> Any:
    """The error function in x's dtype, to within two roundings: 2/√π ∫₀ˣ exp(−t²) dt. Any shape; NaN gives NaN."""
    xp = namespace(x)
    a = xp.abs(x)
    near, middle, far = xp.minimum(a, 0.46875), xp.clip(a, 0.46875, 4.0), xp.clip(a, 4.0, 30.0)
    r = 1 / (far * far)
    tail = (_ONE_OVER_SQRT_PI - r * _ratio(r, _FAR)) / far * xp.exp(-far * far)
    complement = xp.where(a <= 4.0, xp.exp(-middle * middle) * _ratio(middle, _MIDDLE), tail)
    return xp.where(a <= 0.46875, x * _ratio(near * near, _NEAR), xp.sign(x) * (1 - complement))


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(−x)) in x's dtype, without overflow. Any shape; NaN gives NaN."""
    xp = namespace(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0, e, 1) / (1 + e)
