"""Operators: exact adjoints, true norms, centred kernels, and one sentence for bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import convolve
from torch.nn import functional

from rectiflow.images.degradations import (
    JPEG,
    Blur,
    Downscale,
    Grey,
    Identity,
    LinearOperator,
    Mask,
    box_mask,
    build,
    gaussian_kernel,
    measure,
    motion_kernel,
    power_norm,
    read_mask,
)
from rectiflow.images.degradations.blurs import PADDINGS
from rectiflow.vectors.jpeg import BRIGHTNESS


def uneven_kernel() -> torch.Tensor:
    """Symmetric in no direction, so that a flip that is missing shows."""
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(1))


OPERATORS = {
    "identity": (Identity(), (3, 8, 12)),
    "mask": (Mask(torch.rand(8, 12, generator=torch.Generator().manual_seed(0))), (3, 8, 12)),
    "mask of channels": (Mask(torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1)), (3, 1, 1)),
    "box": (Mask(box_mask((1, 8, 8), 4)), (1, 8, 8)),
    "downscale": (Downscale(2), (3, 8, 12)),
    "grey": (Grey(), (3, 8, 12)),
    **{
        f"blur, {padding}": (Blur(uneven_kernel(), padding), (3, 8, 12)) for padding in PADDINGS
    },
    "motion": (Blur(motion_kernel(5, 30.0)), (1, 8, 8)),
    "composition": (Downscale(2) @ Blur(gaussian_kernel(5, 1.0)) @ Grey(), (3, 8, 12)),
}  # fmt: skip


@pytest.fixture(params=OPERATORS)
def case(request) -> tuple[LinearOperator, tuple[int, ...]]:
    return OPERATORS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(case, dtype):
    operator, image = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *image, generator=generator, dtype=dtype)
    y = torch.randn(2, *operator.shape(image), generator=generator, dtype=dtype)
    forward, backward = (operator.A(x) * y).sum(), (x * operator.AT(y)).sum()
    # Inner products of up to 600 numbers: rounding grows with their root.
    bound = 1e-6 * x.norm() * y.norm() if dtype == torch.float32 else 1e-13 * x.norm() * y.norm()
    assert abs(forward - backward) <= bound


def test_adjoint_is_that_of_autograd_in_every_gradient_mode(case):
    operator, image = case
    x = torch.randn(1, *image, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, *operator.shape(image), dtype=torch.float64)
    (wanted,) = torch.autograd.grad((operator.A(x) * y).sum(), x)
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(operator.AT(y.clone()), wanted)


def test_norm_bounds_the_true_one(case):
    operator, image = case
    found = power_norm(operator, image, generator=torch.Generator().manual_seed(0), iterations=200)
    bound = operator.norm(image)
    assert found <= bound * (1 + 1e-6)
    assert found >= 0.6 * bound


def test_norms_with_a_closed_form():
    assert Downscale(4).norm((1, 8, 8)) == 0.25
    assert Grey().norm((3, 2, 2)) == pytest.approx(0.6686, abs=1e-4)
    assert Mask(box_mask((1, 4, 4), 2)).norm((1, 4, 4)) == 1


def test_linear_in_the_image_and_inputs_left_alone(case):
    operator, image = case
    x, z = torch.randn(2, 1, *image, dtype=torch.float64)
    kept = x.clone()
    torch.testing.assert_close(operator(2 * x - z), 2 * operator(x) - operator(z))
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [gaussian_kernel(11, 1.0), gaussian_kernel(3, 5.0),
                                    motion_kernel(9), motion_kernel(9, 90.0),
                                    motion_kernel(7, 33.0)])  # fmt: skip
def test_kernels_are_symmetric_and_sum_to_one(kernel):
    torch.testing.assert_close(kernel, kernel.flip(0, 1), rtol=0, atol=1e-8)
    assert float(kernel.double().sum()) == pytest.approx(1, abs=1e-6)
    centre = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
    assert float(kernel.max()) == pytest.approx(float(centre))


def test_official_kernel_has_two_equal_tops_off_centre():
    line = gaussian_kernel(11, 1.0, official=True).sum(0)
    assert line[5] == pytest.approx(float(line[6]))


def test_motion_moves_along_its_angle():
    torch.testing.assert_close(motion_kernel(5)[2], torch.full((5,), 0.2))
    torch.testing.assert_close(motion_kernel(5, 90.0)[:, 2], torch.full((5,), 0.2))
    rising = motion_kernel(5, 45.0)
    assert rising[1, 3] > 0
    assert rising[3, 3] == 0


@pytest.mark.parametrize("padding, mode", [("reflect", "mirror"), ("replicate", "nearest"),
                                           ("circular", "wrap"), ("zero", "constant")])  # fmt: skip
def test_blur_is_the_convolution_of_scipy(padding, mode):
    image = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blur = Blur(uneven_kernel(), padding)
    wanted = convolve(image.numpy(), blur.kernel.numpy(), mode=mode)
    np.testing.assert_allclose(blur.A(image[None, None])[0, 0].numpy(), wanted, atol=1e-12)


def test_borders_stay_bright_unless_padded_with_zeros():
    ones = torch.ones(1, 1, 8, 8)
    kernel = gaussian_kernel(5, 1.0)
    torch.testing.assert_close(Blur(kernel).A(ones), ones)
    assert Blur(kernel, "zero").A(ones)[0, 0, 0, 0] < 0.6


def test_composition_applies_the_inner_first():
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close((Downscale(2) @ Grey()).A(x), functional.avg_pool2d(Grey().A(x), 2))


def test_noise_is_drawn_once_and_not_where_nothing_is_measured():
    x, mask = torch.zeros(2, 1, 8, 8), Mask(box_mask((1, 8, 8), 4))
    draws = [
        measure(mask, x, noise=0.1, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0][..., 2:6, 2:6].any()
    assert draws[0][..., :2, :].std() == pytest.approx(0.1, rel=0.4)
    # The operator itself never adds any.
    assert torch.equal(mask.A(x), mask.A(x))


def test_jpeg_rounds_cosines_to_the_table():
    block = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    found = dctn(JPEG(50).A(block)[0, 0].numpy() * 127.5, norm="ortho")
    steps = np.array(BRIGHTNESS)
    wanted = np.round(dctn(block[0, 0].numpy() * 127.5, norm="ortho") / steps) * steps
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_jpeg_loses_less_at_higher_quality_and_lets_the_gradient_through():
    x = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = [(JPEG(q).A(x) - x).square().mean() for q in (5, 50, 100)]
    assert loss[0] > loss[1] > loss[2]
    assert loss[2] < 1e-4
    x = torch.randn(1, 3, 8, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 3, 8, 16, dtype=torch.float64)
    (slope,) = torch.autograd.grad((JPEG(30).A(x) * weight).sum(), x)
    torch.testing.assert_close(slope, weight)


def test_words(tmp_path):
    assert build("box:2", (1, 4, 4)).A(torch.ones(1, 1, 4, 4)).sum() == 12
    assert build("blur:3:1.0:zero", (1, 4, 4)).padding == "zero"
    assert build("grey+downscale:2", (3, 4, 4)).shape((3, 4, 4)) == (1, 2, 2)
    assert not isinstance(build("jpeg:20+downscale:2", (1, 8, 8)), LinearOperator)
    file = tmp_path / "keep.png"
    Image.fromarray(np.array([[255, 0], [0, 255]], np.uint8)).save(file)
    assert read_mask(file).tolist() == [[1, 0], [0, 1]]
    assert build(f"mask:{file}", (1, 2, 2)).A(torch.ones(1, 1, 2, 2)).sum() == 2


@pytest.mark.parametrize(
    "spec, image, said",
    [
        ("bluur:3:1", (1, 8, 8), "did you mean 'blur'"),
        ("blur:3", (1, 8, 8), "write blur:SIZE:STD"),
        ("blur:x:1", (1, 8, 8), "write blur:SIZE:STD"),
        ("blur:4:1", (1, 8, 8), "size must be odd"),
        ("blur:3:nan", (1, 8, 8), "std must be > 0, got nan"),
        ("blur:31:1", (1, 8, 8), "at least 16 pixels"),
        ("blur:3:1:mirror", (1, 8, 8), "unknown padding 'mirror'"),
        ("downscale:3", (1, 8, 8), "multiples of 3"),
        ("downscale:1", (1, 8, 8), "factor must be >= 2"),
        ("grey", (1, 8, 8), "must have 3 channels to be made grey, got 1"),
        ("box:9", (1, 8, 8), "does not lie inside an image of 8x8"),
        ("box:8", (1, 8, 8), "keeps nothing"),
        ("jpeg:0", (1, 8, 8), "quality must be in 1 to 100"),
    ],
)
def test_bad_words(spec, image, said):
    with pytest.raises(ValueError, match=said):
        build(spec, image)


def test_bad_masks(tmp_path):
    with pytest.raises(ValueError, match="keeps nothing"):
        Mask(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="keeps everything"):
        Mask(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got -1 to 1"):
        Mask(torch.tensor([[-1.0, 1.0]]))
    with pytest.raises(ValueError, match="values in"):
        Mask(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="the mask is 4x4 but the image is 8x8"):
        Mask(box_mask((1, 4, 4), 2)).A(torch.zeros(1, 1, 8, 8))
    with pytest.raises(FileNotFoundError, match="no mask"):
        read_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"the mask .*text.png cannot be read"):
        read_mask(tmp_path / "text.png")


def test_shapes_are_checked_on_both_sides(case):
    operator, image = case
    with pytest.raises(ValueError, match="shape"):
        operator.A(torch.zeros(image))
    with pytest.raises(ValueError, match="shape"):
        operator.AT(torch.zeros(operator.shape(image)))


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match="noise must be >= 0"):
        measure(Identity(), torch.zeros(1, 1, 2, 2), noise=-1.0)
