"""Newton-Schulz against the singular value decomposition, and against the polynomials on singular values alone."""

import pytest
import torch

from megatron_joy.optim.newton_schulz import COEFFICIENTS, orthogonalize, triples

SHAPES = [(24, 24), (16, 48), (48, 16), (5, 64)]
# Where a normalised singular value s in [0.01, 1] ends after five iterations, by either set (scanned below).
LOWEST, HIGHEST = 0.65, 1.22


def on_singular_values(values: torch.Tensor, name: str, steps: int) -> torch.Tensor:
    """The iterations on numbers, in fp64."""
    for a, b, c in triples(name, steps):
        values = a * values + b * values**3 + c * values**5
    return values


def matrices(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    """Random ones of very different sizes."""
    random = torch.Generator().manual_seed(hash(shape) % 1000)
    return torch.randn(count, *shape, generator=random) * torch.tensor([1e-4, 1.0, 1e3])[:count, None, None]


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_follow_the_polynomials(shape: tuple[int, int], name: str) -> None:
    given = matrices(shape)
    u, s, vh = torch.linalg.svd(given.double(), full_matrices=False)
    moved = on_singular_values(s / (s.norm(dim=-1, keepdim=True) + 1e-7), name, 5)
    expected = u @ torch.diag_embed(moved) @ vh
    # fp32 rounding, times the slope of five polynomials at zero (at most 3.4445^5 = 485) for the smallest ones
    torch.testing.assert_close(
        orthogonalize(given, triples(name, 5), torch.float32).double(), expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_result_is_the_nearest_orthogonal_matrix_within_the_polynomials_error(name: str) -> None:
    scan = on_singular_values(torch.linspace(0.01, 1, 10_001, dtype=torch.float64), name, 5)
    assert float(scan.min()) > LOWEST and float(scan.max()) < HIGHEST
    for shape in SHAPES[1:]:  # square ones have singular values below 0.01
        given = matrices(shape)
        u, s, vh = torch.linalg.svd(given.double(), full_matrices=False)
        assert float((s / s.norm(dim=-1, keepdim=True)).min()) > 0.01
        error = orthogonalize(given, triples(name, 5), torch.float32).double() - u @ vh
        assert float(torch.linalg.matrix_norm(error, ord=2).max()) < max(1 - LOWEST, HIGHEST - 1)


def test_bf16_iterations_are_close_to_fp32_ones() -> None:
    given = matrices((16, 48))
    difference = orthogonalize(given, triples("moonlight", 5), torch.bfloat16) - orthogonalize(
        given, triples("moonlight", 5), torch.float32
    )
    assert 1e-4 < float(difference.abs().max()) < 0.05


def test_each_matrix_of_a_stack_is_orthogonalised_by_itself() -> None:
    given = matrices((16, 48))
    together = orthogonalize(given, triples("moonlight", 5), torch.float32)
    for one, alone in zip(together, given, strict=True):
        torch.testing.assert_close(one, orthogonalize(alone[None], triples("moonlight", 5), torch.float32)[0])


def test_an_expert_without_tokens_gets_no_update() -> None:
    given = torch.zeros(2, 8, 4)
    given[1] = 1.0
    made = orthogonalize(given, triples("moonlight", 5), torch.float32)
    assert not made[0].any() and made[1].any() and torch.isfinite(made).all()


def test_the_last_triple_goes_on() -> None:
    assert triples("moonlight", 3) == ((3.4445, -4.7750, 2.0315),) * 3
    assert triples("quintic", 7)[4:] == ((2.8366, -3.0525, 1.2012),) * 3
