import pytest
import torch

from rectiflow.flows import L2, FeatureL2, PseudoHuber, RectifiedPath, Regression


def regression(output, *, t=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, *output.shape, generator=generator, dtype=torch.float64)
    t = torch.rand(len(output), generator=generator, dtype=torch.float64) if t is None else t
    path = RectifiedPath()
    x = path.interpolate(source, target, t)
    return Regression(output, target - source, x, t, target, path, "velocity")


def random(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_l2_is_the_mean_of_squares_of_each_sample():
    given = regression(random(4, 2, 3))
    wanted = torch.stack([((o - w) ** 2).mean() for o, w in zip(given.output, given.wanted)])
    torch.testing.assert_close(L2()(given), wanted)


def test_estimate_is_the_data_that_the_output_implies():
    given = regression(random(4, 3))
    exact = Regression(given.wanted, *[getattr(given, n) for n in list(vars(given))[1:]])
    torch.testing.assert_close(exact.estimate, given.target)


def test_invariant_7_feature_loss_of_the_identity_is_plain():
    given = regression(random(4, 3))
    torch.testing.assert_close(FeatureL2(lambda x: x)(given), L2()(given))


def test_invariant_7_feature_loss_of_a_matrix():
    given, matrix = regression(random(4, 3)), random(6, 3, seed=6)
    wanted = (given.difference @ matrix.T).square().mean(1)
    torch.testing.assert_close(FeatureL2(lambda x: x @ matrix.T)(given), wanted)


def test_invariant_7_feature_loss_uses_the_jacobian_at_the_state():
    def features(x):
        return torch.stack([x[:, 0] * x[:, 1], x[:, 1].sin(), x[:, 2] ** 3], 1)

    given = regression(random(4, 3))
    rows = []
    for x, difference in zip(given.x, given.difference):
        jacobian = torch.autograd.functional.jacobian(lambda p: features(p[None])[0], x)
        rows.append((jacobian @ difference).square().mean())
    torch.testing.assert_close(FeatureL2(features)(given), torch.stack(rows))


@pytest.mark.parametrize(
    "premetric",
    [L2(), PseudoHuber(0.3), FeatureL2(torch.tanh), FeatureL2(torch.tanh, plain=0.5)],
    ids=["l2", "pseudo-huber", "feature", "feature-and-plain"],
)
def test_invariant_7_gradients_match_finite_differences(premetric):
    output = random(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: premetric(regression(o)), output)


def test_plain_share_is_added():
    given = regression(random(4, 3))
    nothing = FeatureL2(lambda x: x * 0, plain=0.25)
    torch.testing.assert_close(nothing(given), 0.25 * L2()(given))
    with pytest.raises(ValueError, match="plain must be >= 0"):
        FeatureL2(lambda x: x, plain=-1.0)


def shifted(difference):
    base = regression(torch.zeros_like(difference))
    return regression(base.wanted + difference)


def test_pseudo_huber_is_quadratic_for_small_differences():
    difference = 1e-4 * random(5, 3)
    wanted = difference.square().sum(1) / (2 * 0.5) / 3
    # The next term is smaller by |d|² / (4 c²), about 1e-7.
    torch.testing.assert_close(PseudoHuber(0.5)(shifted(difference)), wanted, rtol=1e-6, atol=0)


def test_pseudo_huber_is_linear_for_large_differences():
    difference = 1e6 * random(5, 3)
    wanted = (difference.norm(dim=1) - 0.5) / 3
    torch.testing.assert_close(PseudoHuber(0.5)(shifted(difference)), wanted, rtol=1e-9, atol=0)


def test_pseudo_huber_gradient_is_bounded():
    for size in (1e-3, 1.0, 1e4):
        output = (size * random(6, 4)).requires_grad_()
        PseudoHuber(0.1)(regression(output)).sum().backward()
        assert (output.grad.norm(dim=1) <= 1 / 4 + 1e-12).all()


def test_pseudo_huber_default_grows_with_the_dimension():
    given = regression(random(2, 50))
    torch.testing.assert_close(PseudoHuber()(given), PseudoHuber(0.00054 * 50)(given))
    with pytest.raises(ValueError, match="c must be > 0"):
        PseudoHuber(0.0)


def test_invariant_8_one_step_distillation_is_the_loss_at_time_zero():
    zero = torch.zeros(4, dtype=torch.float64)
    given = regression(random(4, 3), t=zero)
    source = given.target - given.wanted
    one_step = source + given.output
    torch.testing.assert_close(L2()(given), (one_step - given.target).square().mean(1))
    torch.testing.assert_close(given.x, source)
