"""What all kernels compute with: gelu and the norm with their derivatives, on blocks of tokens.

X = (Z - mean) rstd over D features, and N, its Jacobian there, which is symmetric:

    N(p) = rstd (p - m(p) - X m(p X))        m: mean over the features
"""

from __future__ import annotations

from titans_pytorch.kernels.language import tl, triton


@triton.jit
def gelu(z: tl.tensor) -> tl.tensor:
    return 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))


@triton.jit
def density(z: tl.tensor) -> tl.tensor:
    """The density of a standard normal variable"""
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def gelu_slope(z: tl.tensor) -> tl.tensor:
    """gelu'"""
    return 0.5 * (1 + tl.math.erf(z * 0.7071067811865476)) + z * density(z)


@triton.jit
def gelu_curvature(z: tl.tensor) -> tl.tensor:
    """gelu''"""
    return density(z) * (2 - z * z)


@triton.jit
def mean(x: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """The mean over D features, features beyond them being zero.  x: (c d) -> (c 1)"""
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def normalised(z: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """X and rstd; features beyond D have to be zero, and are not in X.  z: (c d) -> (c d), (c 1)"""
    centre = mean(z, D)
    from_centre = z - centre
    if z.shape[1] > D:
        from_centre = tl.where(tl.arange(0, z.shape[1])[None, :] < D, from_centre, 0.0)
    rstd = 1 / tl.sqrt_rn(mean(from_centre * from_centre, D) + 1e-5)
    return from_centre * rstd, rstd


@triton.jit
def through_norm(p: tl.tensor, normed: tl.tensor, rstd: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """N(p); of features beyond D nothing is asked.  p, normed: (c d), rstd: (c 1)"""
    return rstd * (p - mean(p, D) - normed * mean(p * normed, D))


@triton.jit
def through_norm_twice(
    of_error: tl.tensor,
    of_normed: tl.tensor,
    normed: tl.tensor,
    rstd: tl.tensor,
    error: tl.tensor,
    of_rstd: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """The gradient with respect to Z where both X and N(P) have been made of it.  (c d) each

    of_error: of D = N(P); of_normed: of X as it stands in P; error: D itself; of_rstd: m(P X) (c 1)
    """
    direct = through_norm(of_normed - rstd * of_rstd * of_error, normed, rstd, D)
    return direct - rstd * (mean(of_error * normed, D) * error + mean(of_error * error, D) * normed)
