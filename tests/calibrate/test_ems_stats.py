"""EMS from analytic models: closed forms, both derivatives, merging, pooling, degenerate dimensions."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from diffaccel import TableScheduler
from diffaccel.calibrate.ems_probe import ForwardProbe, TrajectoryProbe, choose_method, duals, stat_nodes
from diffaccel.calibrate.ems_stats import fitted, kept_axes, merged, moments_of, reduced_shape, stacked
from diffaccel.core.path import Path
from diffaccel.errors import OptionError
from diffaccel.schedulers.settings import path_of

SHAPE = (2, 3, 2)
RNG = np.random.default_rng(0)
MEAN, VAR = (torch.from_numpy(v) for v in (RNG.standard_normal(SHAPE), np.exp(RNG.standard_normal(SHAPE))))
CONFIGS = {
    "vp": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "v": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    },
    "flow": {"path": "flow", "shift": 3.0},
    "edm": {"path": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}


class Model(torch.nn.Module):
    """The exact eps of Gaussians N(mean, var), one per weight: eps = sum_k w_k eps_k (guidance: weights g, 1 - g)."""

    def __init__(self, config, parts):
        super().__init__()
        self.config, self.parts = config, parts
        self.path = path_of(config)

    def forward(self, x, t):
        n = self.path.at(float(t))
        eps = sum(w * n.sigma * (x - n.alpha * m) / (n.alpha**2 * v + n.sigma**2) for w, m, v in self.parts)
        kind = self.config["prediction_type"]
        if kind == "epsilon" and self.config["path"] == "vp":
            return eps
        x0 = (x - n.sigma * eps) / n.alpha if n.alpha else self.parts[0][1].expand_as(x)
        if self.config["path"] == "edm":  # inside the preconditioning: x0 = c_skip x + c_out output
            d, s = self.config["sigma_data"], n.sigma
            return (x0 - d * d / (s * s + d * d) * x) / (s * d / (s * s + d * d) ** 0.5)
        return n.alpha * eps - n.sigma * x0 if kind == "v_prediction" else eps - x0

    def slope(self, lam):
        return sum(w / (1 + v * np.exp(2 * lam)) for w, _, v in self.parts)


def measured(name, parts, lams, *, method="difference", points="trajectory", reduce="element", batch=6, seed=0):
    """Moments as a pipeline's loop brings them about."""
    config = TableScheduler(**CONFIGS[name]).config
    model = Model(config, parts)
    path = model.path
    nodes, skip = stat_nodes(path, lams)
    seeds, generator = range(seed, seed + batch), torch.Generator().manual_seed(seed)
    kind, own = (TrajectoryProbe, True) if points == "trajectory" else (ForwardProbe, False)
    probe = kind.probing(config, nodes, seeds, method=method, reduce=reduce, own_noise=own)
    with duals(model) if method == "jvp" else nullcontext():
        if points == "trajectory":
            probe.begin(skip, lams).set_timesteps(1)
            m, v = parts[0][1:]
            x = nodes[0].alpha * m + (nodes[0].alpha ** 2 * v + nodes[0].sigma ** 2).sqrt() * torch.randn(
                batch, *SHAPE, generator=generator, dtype=torch.float64
            )
        else:
            clean = MEAN + VAR.sqrt() * torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)
            x = probe.begin(clean, seeds, lams).first()
            probe.set_timesteps(1)
        for t in probe.timesteps.double() if name != "vp" else probe.timesteps:
            fed = probe.scale_model_input(x, t)
            assert fed.shape == x.shape
            x = probe.step(model(x, t), t, x, return_dict=False)[0]
    return probe.moments


GAUSSIAN = [(1.0, MEAN, VAR)]
GUIDED = [(3.0, MEAN, VAR), (-2.0, -MEAN, 1.5 * VAR)]
LAMS = np.linspace(-2.5, 3.0, 23)


@pytest.mark.parametrize("points", ["trajectory", "forward"])
@pytest.mark.parametrize("method", ["difference", "jvp"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_gaussian_data_has_its_closed_form(name, method, points):
    """`l = 1/(1 + V e^(2 lam))` to rounding, f = -l m has no variance: s = 0, `b = -dl/dlam m`."""
    found = measured(name, GAUSSIAN, LAMS, method=method, points=points)
    # the timestep reaches the model as float32, which moves its level by 1e-7 or so
    level = 1e-5
    fit = fitted(LAMS, found, ridge=1e-3)
    l = np.stack([Model(TableScheduler(**CONFIGS[name]).config, GAUSSIAN).slope(v) for v in LAMS])
    np.testing.assert_allclose(fit.ems.l, l, atol=level)
    assert np.abs(fit.ems.s).max() < 1e-2
    slope = np.gradient(l, LAMS, axis=0, edge_order=2)
    closed = -slope * MEAN.numpy()
    inner = slice(1, -1) if points == "trajectory" else slice(None)
    np.testing.assert_allclose(fit.ems.b[inner], closed[inner], atol=0.06 * np.abs(closed).max())


def test_guided_models_have_the_statistics_of_their_output():
    """w eps_1 + (1 - w) eps_2: l is the same mixture of l's; both derivatives agree; s is that of f, f' themselves."""
    a, b = (measured("vp", GUIDED, LAMS, method=m, batch=40) for m in ("difference", "jvp"))
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-3 * np.abs(b[key]).max() + 1e-18)
    l = np.stack([Model(TableScheduler(**CONFIGS["vp"]).config, GUIDED).slope(v) for v in LAMS])
    np.testing.assert_allclose(fitted(LAMS, b).ems.l, l, atol=1e-5)


def test_least_squares_of_the_stored_points():
    """s and b are the regression of f' on f, whatever way the moments were taken."""
    rng = np.random.default_rng(3)
    y, e, d = rng.standard_normal((3, 5, 200, 4))
    l = rng.standard_normal((5, 200, 4))
    lam = np.linspace(-1, 1, 5)
    nodes = [
        moments_of(torch.from_numpy(l[k]), [torch.from_numpy(v[k]) for v in (y, e, d)], "element") for k in range(5)
    ]
    ems = fitted(lam, stacked(nodes), ridge=0.0).ems
    mean, slope = l.mean(1), np.gradient(l.mean(1), lam, axis=0, edge_order=2)
    f = e - mean[:, None] * y
    g = (mean[:, None] - 1) * e + d - slope[:, None] * y
    for k in range(5):
        for i in range(4):
            s, b = np.polyfit(f[k, :, i], g[k, :, i], 1)
            assert (ems.s[k, i], ems.b[k, i]) == pytest.approx((s, b), rel=1e-9)


@pytest.mark.parametrize("reduce", ["element", "channel", "scalar"])
def test_parts_merge_to_the_whole(reduce):
    rng = np.random.default_rng(4)
    l, y, e, d = (torch.from_numpy(v) for v in 3 + rng.standard_normal((4, 12, *SHAPE)))

    def part(a, b):
        return stacked([moments_of(l[a:b], [y[a:b], e[a:b], d[a:b]], reduce)])

    whole, pieces = part(0, 12), merged(merged(part(0, 3), part(3, 4)), part(4, 12))
    for key in whole:
        np.testing.assert_allclose(pieces[key], whole[key], rtol=1e-12)
    assert whole["l"].shape[1:] == reduced_shape(SHAPE, reduce)
    if reduce != "element":  # the elements of a pooled axis are further points of one regression
        axes = (0, 2, 3) if reduce == "channel" else (0, 1, 2, 3)
        np.testing.assert_allclose(whole["l"].ravel(), l.numpy().mean(axes).ravel(), rtol=1e-12)
        cov = (e * d).numpy().mean(axes) - e.numpy().mean(axes) * d.numpy().mean(axes)
        np.testing.assert_allclose(whole["m2"][0, 4].ravel() / float(whole["n"][0]), cov.ravel(), rtol=1e-9)


def test_channels_of_images_videos_and_tokens():
    assert kept_axes((4, 8, 8), "channel") == (0,) and kept_axes((16, 5, 8, 8), "channel") == (0,)
    assert kept_axes((64, 16), "channel") == (1,)
    assert reduced_shape((64, 16), "channel") == (1, 16) and reduced_shape((4, 8, 8), "scalar") == ()


def test_a_dimension_that_never_changes():
    """A constant pixel: no NaN, s = 0 exactly, `b = E f'`."""
    rng = np.random.default_rng(5)
    y, e, d = rng.standard_normal((3, 3, 10, 2))
    y[..., 1], e[..., 1], d[..., 1] = 0.0, 0.0, 0.25
    l = torch.zeros(10, 2, dtype=torch.float64)
    lam = np.linspace(0, 1, 3)
    nodes = [moments_of(l, [torch.from_numpy(v[k]) for v in (y, e, d)], "element") for k in range(3)]
    for ridge in (0.0, 1e-12):
        ems = fitted(lam, stacked(nodes), ridge=ridge).ems
        np.testing.assert_array_equal(ems.s[:, 1], 0.0)
        np.testing.assert_array_equal(ems.b[:, 1], 0.25)
        assert np.isfinite(ems.s).all()


def test_outliers_are_counted_and_too_many_refused():
    rng = np.random.default_rng(6)
    y, e = rng.standard_normal((2, 3, 10, 300))
    d = e.copy()
    d[..., 0] *= 1e4
    l = torch.zeros(10, 300, dtype=torch.float64)

    def fit(d):
        nodes = [moments_of(l, [torch.from_numpy(v[k]) for v in (y, e, d)], "element") for k in range(3)]
        return fitted(np.linspace(-3, 3, 3), stacked(nodes))

    assert fit(d).outliers == pytest.approx(1 / 300)
    with pytest.raises(OptionError, match=r"100\.0 % of the statistics"):
        fit(1e4 * e)


def test_the_error_of_l_falls_with_the_square_root_of_the_points():
    """At independent points of a model whose Jacobian varies: four times the error with a sixteenth of the points."""

    class Bent(Model):
        def forward(self, x, t):
            return super().forward(x, t) + 0.3 * torch.sin(2 * x)

    lams = np.linspace(-1.0, 1.0, 3)
    config = TableScheduler(**CONFIGS["vp"]).config
    nodes, _ = stat_nodes(path_of(config), lams)
    model = Bent(config, GAUSSIAN)

    def l_of(batch, seed):
        clean = MEAN + VAR.sqrt() * torch.randn(
            batch, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        seeds = range(1000 * seed, 1000 * seed + batch)
        probe = ForwardProbe.probing(config, nodes, seeds, method="jvp", reduce="element", own_noise=False)
        with duals(model):
            x = probe.begin(clean, seeds, lams).first()
            probe.set_timesteps(1)
            for t in probe.timesteps:
                x = probe.step(model(x, t), t, x, return_dict=False)[0]
        return fitted(lams, probe.moments)

    truth = sum(l_of(900, s).ems.l for s in range(50, 54)) / 4
    errors, claimed = [], []
    for batch in (16, 256):
        runs = [l_of(batch, s) for s in range(3)]
        errors.append(np.sqrt(np.mean([(r.ems.l - truth) ** 2 for r in runs])))
        claimed.append(np.mean([r.l_error for r in runs]))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.35)
    assert claimed[0] == pytest.approx(errors[0], rel=0.35)


def test_smoothing_keeps_what_is_constant_and_refuses_where_there_is_nothing():
    rng = np.random.default_rng(7)
    y, e, d = rng.standard_normal((3, 3, 50, 2, 6, 6))
    l = torch.from_numpy(np.full((50, 2, 6, 6), 0.5))
    nodes = stacked([moments_of(l, [torch.from_numpy(v[k]) for v in (y, e, d)], "element") for k in range(3)])
    lam = np.linspace(-1, 1, 3)
    rough, smooth = fitted(lam, nodes).ems, fitted(lam, nodes, smooth_space=1.0, smooth_lam=0.5).ems
    np.testing.assert_allclose(smooth.l, 0.5, atol=1e-12)
    assert smooth.s.std() < 0.6 * rough.s.std()
    flat = stacked([moments_of(l, [torch.from_numpy(v[k]) for v in (y, e, d)], "channel") for k in range(3)])
    with pytest.raises(OptionError, match="have none"):
        fitted(lam, flat, smooth_space=1.0)
    with pytest.raises(OptionError, match="0 or more"):
        fitted(lam, flat, smooth_lam=-1.0)


def test_nodes_of_a_run_begin_where_the_noise_belongs():
    path = Path.flow()
    nodes, skip = stat_nodes(path, np.linspace(-2, 2, 5))
    assert skip == 1 and nodes[0].key == path.first.key and nodes[-1].sigma == 0
    vp = path_of(TableScheduler(**CONFIGS["vp"]).config)
    nodes, skip = stat_nodes(vp, np.linspace(-1, 2, 7))
    assert nodes[0].key == vp.first.key and nodes[skip].lam == pytest.approx(-1) and skip == 3
    assert stat_nodes(vp, np.linspace(vp.first.lam, 2, 7))[1] == 0


def test_a_model_without_forward_derivatives_falls_back_or_says_so():
    def attempt(method):
        raise NotImplementedError("no forward AD for this kernel")

    method, why = choose_method("auto", attempt)
    assert method == "difference" and "no forward AD" in why
    with pytest.raises(OptionError, match="use method='difference'"):
        choose_method("jvp", attempt)
    assert choose_method("auto", lambda m: None)[0] == "jvp"
