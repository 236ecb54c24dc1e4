"""The selective scan is the recurrence written out: values, gradients, bounded memory."""

from __future__ import annotations

import pytest
import torch

from megatron_miniplm.models.selective_scan import (
    SEGMENT,
    linear_scan,
    scan_in_blocks,
    selective_scan,
)

B, D, N = 2, 3, 4
NAMES = ("u", "step", "bias", "A", "B", "C", "D")


def inputs(length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(length)
    made = [
        torch.randn(length, B, D), torch.randn(length, B, D), torch.randn(D), -torch.rand(D, N) * 3,
        torch.randn(length, B, N), torch.randn(length, B, N), torch.randn(D),
    ]  # fmt: skip
    return [each.to(dtype).requires_grad_() for each in made]


def written_out(u, step, bias, a, b, c, d) -> torch.Tensor:
    """Token by token, channel by channel."""
    state, out, dt = u.new_zeros(B, D, N), [], (1 + (step + bias).exp()).log()
    for at in range(len(u)):
        state = (dt[at][..., None] * a).exp() * state
        state = state + dt[at][..., None] * b[at][:, None] * u[at][..., None]
        out.append((state * c[at][:, None]).sum(-1) + d * u[at])
    return torch.stack(out)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 31, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 44])
def test_values_and_gradients_are_those_of_the_recurrence(length: int) -> None:
    given, upstream = inputs(length), torch.randn(length, B, D, dtype=torch.float64)
    found, expected = selective_scan(*given), written_out(*given)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    ours = torch.autograd.grad(found, given, upstream)
    for name, mine, theirs in zip(
        NAMES, ours, torch.autograd.grad(expected, given, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=name)


def test_state_that_decays_to_nothing_stays_finite() -> None:
    # Cumulated factors underflow: forms that divide by them give NaN.
    given = inputs(300)
    with torch.no_grad():
        given[1] += 400.0
    found = selective_scan(*given)
    torch.testing.assert_close(found, written_out(*given), rtol=1e-11, atol=1e-9)
    for gradient in torch.autograd.grad(found.sum(), given):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 16, 31, 300])
def test_scan_in_blocks_is_the_scan_token_by_token(length: int) -> None:
    torch.manual_seed(length)
    factor, term = torch.rand(2, length, B, D, dtype=torch.float64)
    initial = torch.randn(B, D, dtype=torch.float64)
    expected = linear_scan(factor, term, initial)
    torch.testing.assert_close(
        scan_in_blocks(factor, term, initial), expected, rtol=1e-12, atol=1e-12
    )


def test_linear_scan_passes_gradcheck() -> None:
    torch.manual_seed(0)
    factor, term = (torch.randn(7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    initial = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scan, (factor, term, initial))


def test_low_precision_input_is_scanned_in_fp32() -> None:
    exact = inputs(200, torch.float32)
    rounded = [
        each.detach().bfloat16() if at in (0, 1, 4, 5) else each for at, each in enumerate(exact)
    ]
    found = selective_scan(*rounded)
    assert found.dtype == torch.bfloat16
    expected = selective_scan(*(each.detach().float() for each in rounded))
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)  # its one rounding


def test_what_is_kept_for_the_backward_pass_has_no_states() -> None:
    length = 2 * SEGMENT
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        selective_scan(*inputs(length))
    assert max(kept) <= length * B * max(D, N) < SEGMENT * B * D * N
