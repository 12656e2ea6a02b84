"""Orthogonalising matrices by Newton-Schulz iterations: the heart of Muon."""

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# An iteration is X <- aX + b(XX')X + c(XX')^2 X, which moves every singular value s to as + bs^3 + cs^5 and leaves the
# singular vectors as they are. The last triple of a set goes on where there are more iterations than triples.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # Jordan's, which Moonlight's report (arXiv 2502.16982) and code keep; singular values end between 0.68 and 1.13.
    "moonlight": ((3.4445, -4.7750, 2.0315),),
    # The default of NVIDIA's Emerging-Optimizers.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
EPS = 1e-7  # beside the Frobenius norm; a matrix of zeros (an expert without tokens) stays one


def triples(name: str, steps: int) -> tuple[Triple, ...]:
    """The polynomials of `steps` iterations."""
    known = COEFFICIENTS[name]
    return tuple(known[min(i, len(known) - 1)] for i in range(steps))


def orthogonalize(matrices: Tensor, polynomials: Sequence[Triple], dtype: torch.dtype) -> Tensor:
    """Each matrix's nearest semi-orthogonal one (UV' of its SVD USV'), within the error of the polynomials.

    matrices fp32 [k, m, n] -> fp32 [k, m, n]; the iterations are in `dtype`, the norm before them in fp32.
    """
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + EPS)  # singular values <= 1
    x = x.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x  # the smaller product of the two
    for a, b, c in polynomials:
        gram = x @ x.mT  # [k, m, m]
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b XX' + c (XX')^2
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
