import torch

from rectiflow.flows import L2, RectifiedPath, Regression, RootMeanSquare


def regression(output, wanted):
    zero = torch.zeros(len(output), dtype=output.dtype)
    return Regression(output, wanted, wanted, zero, wanted, RectifiedPath(), "velocity")


def test_it_is_the_root_of_l2():
    output, wanted = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    given = regression(output, wanted)
    torch.testing.assert_close(RootMeanSquare()(given).square(), L2()(given))


def test_gradient_is_right_and_zero_where_nothing_differs():
    output = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o: RootMeanSquare()(regression(o, wanted)), output)
    RootMeanSquare()(regression(same := wanted.clone().requires_grad_(), wanted)).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(wanted))
