"""Two-dimensional toy distributions, drawn by a seeded generator.

Each family is ``family(generator, size) -> (points (size, 2) float64, labels (size,) or None)``, centred at
the origin and of roughly unit scale (coordinates within about +-2). Second moments E|x|^2 are closed form
and stated, so a sampler can be checked against them. Labels count the pieces a family is made of; all pieces
are equally likely.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["FAMILIES", "PIECES"]

Draw = tuple[np.ndarray, np.ndarray | None]


def two_moons(generator: np.random.Generator, size: int, noise: float = 0.05) -> Draw:
    """Two interleaved half circles of radius 1; E|x|^2 = 1.3125 - 1/pi + 2 noise^2."""
    label = generator.integers(0, 2, size)
    angle = np.pi * generator.random(size)
    outer = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    points = np.where(label[:, None] == 0, outer, -outer)
    return points + noise * generator.standard_normal((size, 2)), label


def eight_gaussians(generator: np.random.Generator, size: int, noise: float = 0.1) -> Draw:
    """Eight Gaussians on a circle of radius 1.5; E|x|^2 = 2.25 + 2 noise^2."""
    label = generator.integers(0, 8, size)
    angle = 2 * np.pi * label / 8
    centres = 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centres + noise * generator.standard_normal((size, 2)), label


def checkerboard(generator: np.random.Generator, size: int) -> Draw:
    """Uniform on the eight dark unit squares of a 4x4 board on [-2, 2]^2; E|x|^2 = 8/3."""
    square = generator.integers(0, 8, size)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    return np.stack([column, row], axis=1) - 2.0 + generator.random((size, 2)), None


def swissroll(generator: np.random.Generator, size: int, noise: float = 0.05) -> Draw:
    """A spiral (a cos a, a sin a)/(2.25 pi), a ~ U(1.5 pi, 4.5 pi); E|x|^2 = 52/27 + 2 noise^2."""
    angle = 1.5 * np.pi * (1 + 2 * generator.random(size))
    curve = (angle / (2.25 * np.pi))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return curve + noise * generator.standard_normal((size, 2)), None


def pinwheel(generator: np.random.Generator, size: int, radial: float = 0.3, tangential: float = 0.1) -> Draw:
    """Five arms, (1 + radial z1, tangential z2) turned by exp(first)/4; E|x|^2 = 1 + radial^2 + tangential^2."""
    label = generator.integers(0, 5, size)
    x, y = (generator.standard_normal((size, 2)) * [radial, tangential] + [1.0, 0.0]).T
    angle = 2 * np.pi * label / 5 + 0.25 * np.exp(x)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1), label


def rings(generator: np.random.Generator, size: int, noise: float = 0.04) -> Draw:
    """Four concentric circles of radius 0.5, 1, 1.5, 2; E|x|^2 = 1.875 + 2 noise^2."""
    label = generator.integers(0, 4, size)
    angle = 2 * np.pi * generator.random(size)
    circle = (0.5 * (label + 1))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return circle + noise * generator.standard_normal((size, 2)), label


FAMILIES: dict[str, Callable[[np.random.Generator, int], Draw]] = {
    "two_moons": two_moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "swissroll": swissroll,
    "pinwheel": pinwheel,
    "rings": rings,
}

# How many labels each family has; absent means unlabelled.
PIECES: dict[str, int] = {"two_moons": 2, "eight_gaussians": 8, "pinwheel": 5, "rings": 4}
