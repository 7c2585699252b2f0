"""Views: exactly invertible, orthogonal, what they do to a picture, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rectiflow.guidance import views
from rectiflow.guidance.views import (
    Flip,
    Identity,
    InnerCircle,
    Jigsaw,
    Negate,
    Part,
    PatchPermute,
    PixelPermute,
    Rest,
    Rotate,
    Skew,
    SquareHinge,
    View,
    assert_orthogonal,
    compose,
    inverse_with_variance,
    parse_view,
)

WORDS = [
    "identity",
    "flip",
    "mirror",
    "rotate:90",
    "rotate:180",
    "rotate:270",
    "negate",
    "skew",
    "skew:-0.7",
    "patch-permute:4:1",
    "pixel-permute:2",
    "jigsaw",
    "jigsaw:5",
    "inner-circle",
    "inner-circle:90:0.5",
    "square-hinge",
    "flip+negate+jigsaw:3",
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# oracle


def test_by_hand() -> None:
    x = torch.arange(4.0).view(2, 2)
    assert Flip().apply(x).tolist() == [[2, 3], [0, 1]]
    assert Flip(horizontal=True).apply(x).tolist() == [[1, 0], [3, 2]]
    assert Rotate(90).apply(x).tolist() == [[1, 3], [0, 2]]
    assert Rotate(270).apply(x).tolist() == [[2, 0], [3, 1]]
    assert Rotate(180).apply(x).tolist() == [[3, 2], [1, 0]]
    assert Negate().apply(x).tolist() == [[0, -1], [-2, -3]]


def test_skew_rolls_columns_by_whole_pixels_cut_toward_zero() -> None:
    x = draw(6, 6)
    seen = Skew(1.5).apply(x)
    for column in range(6):
        wanted = x[:, column].roll(int(1.5 * (column - 3)))
        assert torch.equal(seen[:, column], wanted)
    assert torch.equal(Skew(-1.5).apply(seen), x)


def test_inner_circle_turns_a_disc_and_leaves_the_rest() -> None:
    x = draw(16, 16)
    seen = InnerCircle().apply(x)
    place = torch.arange(16) - 7.5
    inside = place[:, None].square() + place.square() < 36
    assert torch.equal(seen[~inside], x[~inside])
    assert torch.equal(seen[inside], x.rot90(2)[inside])


def test_square_hinge_turns_neighbours_in_opposite_directions() -> None:
    x = draw(8, 8)
    seen = SquareHinge(2).apply(x)
    assert torch.equal(seen[:4, :4], x[:4, :4].rot90(1))
    assert torch.equal(seen[:4, 4:], x[:4, 4:].rot90(-1))
    assert torch.equal(seen[4:, 4:], x[4:, 4:].rot90(1))


def test_patches_stay_whole() -> None:
    x = draw(8, 8)
    cut = {tuple(p.flatten().tolist()) for r in x.split(4) for p in r.split(4, 1)}
    seen = PatchPermute(2, seed=3).apply(x)
    assert {tuple(p.flatten().tolist()) for r in seen.split(4) for p in r.split(4, 1)} == cut
    assert not torch.equal(seen, x)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_jigsaw_are_moved_whole_and_fit(seed: int) -> None:
    """Every pixel goes by one of four turns of the whole, and each piece by one of them."""
    side = 64
    places = torch.arange(float(side * side)).view(side, side)
    seen = Jigsaw(seed).apply(places)
    turns = torch.stack([seen == places.rot90(turn) for turn in range(4)])
    assert turns.any(0).all()
    # The corner pieces are those of the corners, so corners go to corners.
    corners = {int(places[i, j]) for i in (0, -1) for j in (0, -1)}
    assert {int(seen[i, j]) for i in (0, -1) for j in (0, -1)} == corners
    # Tabs reach over the border of the plain squares, of which there would be straight cuts only.
    moved = (seen != places).view(4, 16, 4, 16).float().mean((1, 3))
    assert ((moved > 0) & (moved < 1)).any()


def test_seeds_make_the_order() -> None:
    x = draw(16, 16)
    for make in (PixelPermute, lambda seed: PatchPermute(4, seed), Jigsaw):
        assert torch.equal(make(1).apply(x), make(1).apply(x))
        assert not torch.equal(make(1).apply(x), make(2).apply(x))


# property


@pytest.mark.parametrize("word", WORDS)
def test_views_are_undone_exactly_and_keep_inner_products(word: str) -> None:
    """Invariant 1, on any layout and in any precision."""
    view = parse_view(word)
    for x in (draw(16, 16), draw(3, 16, 16), draw(2, 5, 1, 16, 16), draw(2, 3, 16, 16).bfloat16()):
        assert torch.equal(view.inverse(view.apply(x)), x)
        assert torch.equal(view.apply(view.inverse(x)), x)
    a, b = draw(2, 3, 16, 16).double()
    assert torch.allclose((view.apply(a) * view.apply(b)).sum(), (a * b).sum(), rtol=1e-12)
    assert_orthogonal(view, (3, 16, 16))


@pytest.mark.parametrize("word", WORDS)
def test_places_move_as_the_view_does_and_keep_signs(word: str) -> None:
    x = draw(1, 16, 16).abs()
    places = parse_view(word).places
    assert torch.equal(places.apply(x), parse_view(word).apply(x).abs())
    assert torch.equal(places.inverse(places.apply(x)), x)


def test_gradients_flow_and_cached_orders_survive_inference_mode() -> None:
    view = PixelPermute(seed=99)
    with torch.inference_mode():
        view.apply(draw(1, 6, 6))
    x = draw(1, 6, 6).requires_grad_()
    (view.apply(x) * view.apply(draw(1, 6, 6))).sum().backward()
    torch.testing.assert_close(x.grad, draw(1, 6, 6))


def test_composition_applies_the_first_first() -> None:
    view = compose(Rotate(90), Flip())
    x = draw(1, 4, 4)
    assert torch.equal(view.apply(x), Flip().apply(Rotate(90).apply(x)))
    assert torch.equal(view.apply(x), parse_view("rotate_ccw+flip").apply(x))
    assert compose(Flip()) == Flip()


def test_variances_move_but_are_not_negated() -> None:
    output = draw(2, 6, 4, 4)
    found = inverse_with_variance(compose(Flip(), Negate()), output)
    assert torch.equal(found[:, :3], -output[:, :3].flip(-2))
    assert torch.equal(found[:, 3:], output[:, 3:].flip(-2))
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        inverse_with_variance(Flip(), draw(1, 3, 4, 4))


def test_parts_and_the_rest_are_the_whole() -> None:
    low = Part(lambda x: x.mean((-2, -1), keepdim=True).expand_as(x))
    share = Part(lambda x: 0.3 * x)
    x = draw(2, 3, 4, 4)
    for parts in ((low,), (low, share)):
        total = sum(part.inverse(x) for part in parts) + Rest(*parts).inverse(x)
        torch.testing.assert_close(total, x)
    assert torch.equal(low.apply(x), x)
    assert torch.equal(Rest(low).apply(x), x)


# what is refused


class Blur(View):
    def apply(self, x: Tensor) -> Tensor:
        return (x + x.roll(1, -1)) / 2

    def inverse(self, x: Tensor) -> Tensor:
        return x


class Louder(View):
    def apply(self, x: Tensor) -> Tensor:
        return 2 * x

    def inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Folded(View):
    """Keeps lengths and is not linear."""

    def apply(self, x: Tensor) -> Tensor:
        self.signs = x.sign()
        return x.abs()

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.signs


class Thinned(View):
    def apply(self, x: Tensor) -> Tensor:
        return x[..., ::2]

    def inverse(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "view, said",
    [
        (Blur(), "the view Blur is not orthogonal: its inverse does not bring back"),
        (Louder(), "the view Louder is not orthogonal: it makes an inner product of"),
        (Folded(), "the view Folded is not orthogonal:"),
        (Thinned(), "the view Thinned is not orthogonal: it makes 4x2 of 4x4"),
        (Part(lambda x: 0.5 * x), "the view Part is not orthogonal"),
    ],
)
def test_views_that_are_not_orthogonal_are_refused(view: View, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        assert_orthogonal(view, (1, 4, 4))
    assert "\n" not in str(caught.value)


def test_an_orthogonal_view_of_ones_own_is_accepted() -> None:
    class Mixed(View):
        """A reflection of every row, by a vector of length one."""

        def apply(self, x: Tensor) -> Tensor:
            axis = torch.full((x.shape[-1],), x.shape[-1] ** -0.5, dtype=x.dtype)
            return x - 2 * (x @ axis)[..., None] * axis

        inverse = apply

    assert_orthogonal(Mixed(), (3, 4, 4))


@pytest.mark.parametrize(
    "word, said",
    [
        ("rotate:45", "a turn by 45 degrees is not orthogonal"),
        ("rotate:22.5", "a turn by 22.5 degrees is not orthogonal"),
        ("inner-circle:30", "a disc turned by 30 degrees is not orthogonal"),
        ("blur", r"the view 'blur' is not orthogonal \(what it takes away"),
        ("white_balance", "the view 'white-balance' is not orthogonal"),
        ("flipp", "unknown view 'flipp': did you mean 'flip'"),
        ("flip:2", "the view 'flip:2' is not understood: write flip"),
        ("jigsaw:x", r"the view 'jigsaw:x' is not understood: write jigsaw\[:SEED\]"),
        ("patch-permute:0", "patches must be > 0"),
        ("inner-circle:180:0.7", r"radius must be in \(0, 0.5\], got 0.7"),
    ],
)
def test_wrong_words(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_view(word)


@pytest.mark.parametrize(
    "word, size, said",
    [
        ("jigsaw", (8, 12), "a jigsaw needs square pictures, got 8x12"),
        ("jigsaw", (10, 10), "cannot be cut into 4x4 pieces"),
        ("patch-permute:3", (8, 8), "8x8 cannot be cut into 3x3 patches"),
        ("inner-circle:90", (8, 10), "needs square pictures"),
        ("square-hinge", (8, 10), "needs square pictures"),
        ("rotate:90", (8, 10), "it makes 10x8 of 8x10"),
    ],
)
def test_pictures_that_views_do_not_fit(word: str, size: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assert_orthogonal(parse_view(word), (1, *size))


def test_every_word_of_the_table_is_tested() -> None:
    tested = {part.partition(":")[0] for word in WORDS for part in word.split("+")}
    assert tested == set(views.VIEWS)
    assert parse_view("Identity".lower()) == Identity()
