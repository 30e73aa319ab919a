"""FSampler against its authors' code (tests/golden/fsampler): predictor values, patterns, whole runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import golden_data
import numpy as np
import pytest

from diffaccel.core.extrapolation import Predictor, combined
from diffaccel.core.extrapolation_policy import Extrapolating, Gate, Memory, stabilized
from diffaccel.core.node import Node
from diffaccel.core.path import Nodes
from diffaccel.core.path import Path as NoisePath
from diffaccel.core.pattern import parse
from diffaccel.core.prediction import Prediction, convert
from diffaccel.samplers.registry import get
from diffaccel.samplers.rewrite import rewritten
from diffaccel.samplers.skip import skip

pytestmark = pytest.mark.golden
FOLDER = "fsampler"
FUNCTIONS = golden_data.cases(FOLDER, "functions.npz")
PATTERNS = [
    case for path in golden_data.cases(FOLDER, "patterns.json") for case in json.loads(path.read_text())["patterns"]
]
LISTS = [
    case for path in golden_data.cases(FOLDER, "patterns.json") for case in json.loads(path.read_text())["explicit"]
]
RUNS = golden_data.cases(FOLDER, "traj_*.npz")
PARITY = ("euler", "ddim")  # of the other samplers' official code some is wrong (see the README there)


# ---------------------------------------------------------------------- values
def histories():
    for path in FUNCTIONS:
        for key in golden_data.load(path):
            if found := re.fullmatch(r"hat_h(\d)_len(\d)_sigma(\d)_den(\d)", key):
                yield pytest.param(path, key, *map(int, found.groups()), id=key)


@pytest.mark.parametrize(("path", "key", "order", "length", "sigma", "clean"), list(histories()))
def test_predicted_value(path, key, order, length, sigma, clean):
    data = golden_data.load(path)
    memory = Memory(index=not sigma)
    answers = data["denoised" if clean else "epsilon"]
    for level, answer in list(zip(data["sigmas"], answers, strict=True))[-length:]:
        memory.add(float(level), answer)
    found = memory.raw(order, float(data["target"])) - (data["x_current"] if clean else 0.0)
    np.testing.assert_allclose(found, data[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("path", "key", "order", "length", "sigma", "clean"), list(histories()))
def test_predicted_value_from_node_weights(path, key, order, length, sigma, clean):
    """The weights that a compiled table uses give the same numbers."""
    data = golden_data.load(path)
    edm = NoisePath.edm(1e-3, 100.0, time="sigma")
    nodes = [edm.at(float(s)) for s in data["sigmas"]][-min(length, order) :][::-1]
    target = edm.at(float(data["target"]))
    predictor = Predictor(order, "x0" if clean else "residual", "sigma" if sigma else "index")
    weights = predictor.weights(nodes, target, edm)
    if clean:
        kept = data["denoised"][::-1][: len(nodes)]
    else:  # answers are kept as noise, -sigma times which is the residual
        kept = data["epsilon"][::-1][: len(nodes)] / -np.array([n.sigma for n in nodes])[:, None, None]
    found = combined(weights, kept)
    found = found - data["x_current"] if clean else found * -target.sigma
    np.testing.assert_allclose(found, data[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", FUNCTIONS, ids=golden_data.name)
def test_stabilizer(path):
    data = golden_data.load(path)
    for beta, wanted in zip(data["learn_betas"], data["learn_L"], strict=True):
        level, found = 1.0, []
        for seen in data["learn_obs"]:
            level = stabilized(level, seen, beta)
            found.append(level)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------- patterns
@pytest.mark.parametrize("case", PATTERNS, ids=lambda c: f"{c['mode']}-{c['nodes']}".replace("/", ""))
def test_pattern(case):
    try:
        pattern = replace(parse(case["mode"]), protect=(case["protect_first"], case["protect_last"]))
    except ValueError:
        assert case["skipped"] == []  # what the authors' code silently never skips, ours refuses
        return
    assert pattern.skipped(case["nodes"]) == case["skipped"]


@pytest.mark.parametrize("case", LISTS, ids=lambda c: c["text"])
def test_explicit_list(case):
    pattern = parse(case["text"], streak_rule=True)
    assert {2: "linear", 3: "richardson", 4: "h4"}[pattern.history] == case["predictor"]
    assert list(pattern.listed) == case["parsed"]
    assert pattern.skipped(case["nodes"]) == case["skipped"]
    assert pattern.dropped(case["nodes"]) == sorted(set(case["parsed"]) - set(case["skipped"]))


# ---------------------------------------------------------------------- whole runs
class Model:
    """The exact denoiser of the files; see the README beside them."""

    def __init__(self, seed, dim):
        k, d = np.arange(3)[:, None], np.arange(dim)
        self.means = 1.5 * np.sin(1.7 * (k + 1) * (d + 1) + seed)
        self.stds, self.weights = 0.2 + 0.15 * k, (k[:, 0] + 1) / 6

    def __call__(self, x, node):
        v = (node.alpha * self.stds) ** 2 + node.sigma**2
        away = x[:, None, :] - node.alpha * self.means
        log = np.log(self.weights) - 0.5 * (away**2 / v + np.log(v)).sum(-1)
        share = np.exp(log - log.max(1, keepdims=True))
        share = (share / share.sum(1, keepdims=True))[..., None]
        return (share * (self.means + node.alpha * self.stds**2 / v * away)).sum(1)


def run_of(path: Path):
    data = golden_data.load(path)
    settings = json.loads(str(data["settings"]))
    noise = NoisePath.flow() if settings["path"] == "flow" else NoisePath.edm(1e-6, 1e6, time="sigma")
    found = [Node(float(s), 1.0 - s if settings["path"] == "flow" else 1.0, float(s)) for s in data["sigmas"]]
    return data, settings, Nodes(found, noise), Model(settings["problem"], data["x"].shape[-1])


def predictor_of(settings, history=2):
    quantity = "x0" if settings.get("extrapolate_denoised") else "residual"
    return Predictor(history, quantity, "sigma" if settings.get("sigma_aware") else "index")


def pattern_of(settings):
    protect = (settings["protect_first_steps"], settings["protect_last_steps"])
    if settings.get("skip_indices"):
        return parse(settings["skip_indices"], streak_rule=True)
    return None if settings["skip_mode"] == "adaptive" else parse(settings["skip_mode"], protect)


def policy_for(settings, nodes, model):
    mode, pattern = settings.get("adaptive_mode", "none"), pattern_of(settings)
    protect = (settings["protect_first_steps"], settings["protect_last_steps"])
    gate = Gate(0.10, settings.get("anchor_interval", 4), settings.get("max_consecutive_skips", 2), protect)
    beta = settings.get("smoothing_beta", 0.9) if "learn" in mode else None
    return Extrapolating(
        model, nodes, pattern, gate, predictor_of(settings), stabilizer=beta, gradient="grad_est" in mode
    )


def parity(path):
    settings = json.loads(str(golden_data.load(path)["settings"]))
    return settings["sampler"] in PARITY and not settings.get("skip_indices")


@pytest.mark.parametrize("path", [p for p in RUNS if parity(p)], ids=golden_data.name)
def test_run(path):
    """Decisions, gate errors, stabiliser and states of a run through the functional loop."""
    data, settings, nodes, model = run_of(path)
    seen = []
    policy = policy_for(settings, nodes, model)

    def predict(x, node):
        seen.append(x)
        return policy(x, node)

    last = get("ddim").run(data["x"][0], nodes, predict)
    assert [not skipped for _, skipped, _, _ in policy.decisions] == list(data["real"])
    assert policy.calls == data["evaluations"]
    np.testing.assert_allclose(np.stack([*seen, last]), data["x"], rtol=0, atol=1e-9)
    if policy.stabilizer is not None:  # the authors' code keeps L up to date where it is not used, too
        np.testing.assert_allclose(policy.levels, data["L"], rtol=0, atol=1e-10)
    for (i, hat), wanted in zip(policy.predictions, data["hat"], strict=True):
        hat = hat - seen[i] if settings.get("extrapolate_denoised") else hat
        np.testing.assert_allclose(hat, wanted, rtol=0, atol=1e-9, err_msg=f"prediction at node {i}")
    if "gate" in data and len(data["gate"]):
        errors = [np.nan if error is None else error for _, _, _, error in policy.decisions]
        np.testing.assert_allclose(errors, data["gate"][:, 2], rtol=0, atol=1e-6)


def static(path):
    settings = json.loads(str(golden_data.load(path)["settings"]))
    return parity(path) and settings["skip_mode"] != "adaptive" and settings.get("adaptive_mode", "none") == "none"


@pytest.mark.parametrize("path", [p for p in RUNS if static(p)], ids=golden_data.name)
def test_merged_table(path):
    """The compiled run: a row for each real call, and the authors' states at each of them."""
    data, settings, nodes, model = run_of(path)
    predictor = predictor_of(settings)
    protect = (settings["protect_first_steps"], settings["protect_last_steps"])
    part = skip(settings["skip_mode"], quantity=predictor.quantity, coordinate=predictor.coordinate, protect=protect)
    table = rewritten("ddim", part).trace(nodes)
    assert len(table) == data["evaluations"]

    def predict(x, node, space):
        return convert(Prediction(model(x, node)), space, x, node)

    states = table.apply(data["x"][0], predict, trajectory=True)
    wanted = [*data["x"][:-1][data["real"]], data["x"][-1]]
    np.testing.assert_allclose(np.stack(states), np.stack(wanted), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "path", [p for p in RUNS if "skip_indices" in str(golden_data.load(p)["settings"])], ids=golden_data.name
)
def test_explicit_run_skips_the_same_nodes(path):
    """Its states hold a division that belongs to a stabiliser which is off."""
    data, settings, nodes, _ = run_of(path)
    assert pattern_of(settings).skipped(len(nodes) - 1) == list(data["skipped"])
