"""A mixture whose axes differ as those of images do: what the tests of calibration are run on."""

import numpy as np

from diffaccel.testing.problems import Mixture


def mixture(d: int = 64) -> Mixture:
    """d dimensions with a decaying spectrum, 8 components."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, d + 1) ** -0.5
    means = 0.8 * spectrum * rng.standard_normal((8, d))
    return Mixture(np.full(8, 1 / 8), means, 0.15 * spectrum * (0.5 + rng.random((8, d))))
