"""Published settings of Restart: segments (nodes, repeats, low, high) in sigma/alpha, by name.

From the paper's repositories (arXiv:2306.14878). The EDM figures were made with Heun's method inside and outside
(`sampler="heun"`) and churn = 0.05; the Stable Diffusion ones with DDIM outside and Heun inside.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10-vp": {"segments": [(3, 2, 0.06, 0.30)]},
    "imagenet64-edm-39": {
        "segments": [(3, 1, 19.35, 40.79), (3, 1, 1.09, 1.92), (3, 1, 0.06, 0.30)],
        "s_noise": 1.003,
    },
    "imagenet64-edm-67": {
        "segments": [(5, 1, 19.35, 40.79), (5, 1, 1.09, 1.92), (5, 1, 0.59, 1.09), (5, 1, 0.06, 0.30)],
        "s_noise": 1.003,
    },
    "imagenet64-edm-99": {
        "segments": [
            (3, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 4, 0.59, 1.09), (4, 1, 0.30, 0.59), (4, 4, 0.06, 0.30),
        ],
        "s_noise": 1.003,
    },
    "imagenet64-edm-203": {
        "segments": [
            (4, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 5, 0.59, 1.09), (4, 5, 0.30, 0.59), (6, 6, 0.06, 0.30),
        ],
        "s_noise": 1.003,
    },
    "sd15-w2": {"segments": [(5, 2, 1.0, 9.0), (5, 2, 5.0, 10.0)], "grid": "uniform_t"},
    "sd15-w3": {"segments": [(10, 2, 0.1, 3.0)], "grid": "uniform_t"},
    "sd15-w5": {"segments": [(10, 2, 0.1, 2.0)], "grid": "uniform_t"},
    "sd15-w8": {"segments": [(10, 2, 0.1, 2.0)], "grid": "uniform_t"},
}  # fmt: skip
