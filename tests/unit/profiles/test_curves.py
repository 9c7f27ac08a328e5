"""Interpolation in measured tables: exact at and linear between grid points, going on with the last slope."""

import numpy as np
import pytest

from nexusengine.profiles.curves import Curve, Quad, Surface, locate


def test_a_curve_is_exact_at_its_points_and_linear_between() -> None:
    curve = Curve([1, 4, 8], [10.0, 16.0, 40.0])
    assert [curve(x) for x in (0, 1, 2, 4, 6, 8)] == [10.0, 10.0, 12.0, 16.0, 28.0, 40.0]


@pytest.mark.parametrize("x", [2049, 4096, 16_384, 16_385, 100_000])
def test_a_curve_goes_on_with_the_slope_of_its_last_half(x: int) -> None:
    xs = np.arange(0.0, 2049.0, 16.0)
    jagged = np.where(xs == 2048, 3.0 * xs + 500.0, 3.0 * xs)  # the last segment alone would say 34 a token
    slope = (3.0 * 2048 + 500.0 - 3.0 * 1024) / 1024
    assert Curve(xs, jagged)(x) == pytest.approx(3.0 * 2048 + 500.0 + slope * (x - 2048))


def test_a_curve_never_falls_behind_its_last_point() -> None:
    assert Curve([1, 2, 4], [9.0, 8.0, 5.0])(100) == 5.0


def test_the_sum_of_two_curves_is_the_sum_everywhere() -> None:
    a, b = Curve([1, 100], [1.0, 5.0]), Curve([1, 2000], [2.0, 9.0])
    both = a.plus(b)
    for x in (1, 50, 1999, 20_000):
        assert both(x) == pytest.approx(a(x) + b(x))


def test_a_surface_is_bilinear_and_goes_on_linearly() -> None:
    xs, ys = [1, 2, 8], [0, 16, 64]
    grid = np.array([[3.0 * x + 2.0 * y + 0.5 * x * y for y in ys] for x in xs])
    surface = Surface(xs, ys, grid)
    for x in (1, 1.5, 5, 8, 20):
        for y in (0, 7, 64, 500):
            assert surface(x, y) == pytest.approx(3 * x + 2 * y + 0.5 * x * y)


def test_many_values_along_a_surface_are_those_one_by_one() -> None:
    rng = np.random.default_rng(3)
    surface = Surface([1, 2, 4, 8], [16, 64, 256, 1024], np.sort(rng.random((4, 4)), axis=1))
    ys = np.array([1.0, 16, 40, 1023, 1024, 5000])
    for x in (1, 3, 8, 9):
        assert surface.along(x, ys) == pytest.approx([surface(x, y) for y in ys.tolist()])


def test_four_axes_are_linear_in_each_and_answer_at_two_points_at_once() -> None:
    axes = [[16, 32, 64], [0, 16, 64], [0, 1, 4], [16, 64, 256]]
    points = np.meshgrid(*axes, indexing="ij")
    quad = Quad(axes, points[0] + 2 * points[1] + 3 * points[2] * points[3])
    for a, b, c in ((16, 0, 0), (20, 3, 2), (64, 64, 4), (100, 100, 9)):
        assert quad(a, b, c, 40, 700) == pytest.approx((a + 2 * b + 3 * c * 40, a + 2 * b + 3 * c * 700))


@pytest.mark.parametrize(
    ("x", "expected"), [(0, (0, 0.0)), (1, (0, 0.0)), (2, (1, 0.0)), (3, (1, 0.5)), (4, (1, 1.0)), (6, (1, 2.0))]
)
def test_a_place_on_an_axis_is_a_segment_and_a_share_of_it(x: float, expected: tuple[int, float]) -> None:
    assert locate([1.0, 2.0, 4.0], x) == expected
