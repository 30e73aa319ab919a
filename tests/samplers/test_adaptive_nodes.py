"""`adaptive_nodes`: exact 2M on the nodes that it chose, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes
from diffaccel.errors import OptionError
from diffaccel.samplers.adaptive_nodes import adaptive_nodes
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import PATHS

PROBLEM = four_modes()
EXACT = {"order": 2, "form": "exact", "lower_order_final": False}
CASES = [("edm", "karras"), ("flow_shift3", "trailing"), ("vp", "trailing")]


def start(nodes, count=8):
    return np.hypot(nodes[0].alpha, nodes[0].sigma) * np.random.default_rng(1).standard_normal((count, 2))


@pytest.mark.parametrize(("path", "grid"), CASES)
def test_each_image_is_2m_on_its_own_nodes(path, grid):
    nodes = grid_nodes(PATHS[path], 24, grid)
    x = start(nodes)
    found = adaptive_nodes(PROBLEM.denoise, x, nodes, tol=0.01)
    assert len(set(map(tuple, found.nodes))) > 1 and min(found.calls) < 20
    for b, chosen in enumerate(found.nodes):
        kept = Nodes([*(nodes[i] for i in chosen), nodes[-1]], nodes.path)
        wanted = get("dpmpp").run(x[b : b + 1], kept, PROBLEM.denoise, **EXACT)
        np.testing.assert_allclose(found.x[b], wanted[0], rtol=0, atol=1e-11)


def test_with_no_tolerance_every_node_is_called():
    nodes = grid_nodes(PATHS["edm"], 12, "karras")
    found = adaptive_nodes(PROBLEM.denoise, start(nodes), nodes, tol=1e-12)
    assert found.calls == [12] * 8
    np.testing.assert_allclose(found.x, get("dpmpp").run(start(nodes), nodes, PROBLEM.denoise, **EXACT), atol=1e-11)


def test_an_image_does_not_depend_on_its_batch_and_tensors_work():
    nodes = grid_nodes(PATHS["flow_shift3"], 20, "trailing")
    x = start(nodes)
    together = adaptive_nodes(PROBLEM.denoise, x, nodes, tol=0.01)
    asked = []

    def model(states, node):
        asked.append(len(states))
        return torch.from_numpy(PROBLEM.denoise(states.numpy(), node))

    tensors = adaptive_nodes(model, torch.from_numpy(x), nodes, tol=0.01)
    assert tensors.nodes == together.nodes and sum(asked) == sum(together.calls)
    np.testing.assert_allclose(tensors.x.numpy(), together.x, atol=1e-12)
    for b in range(len(x)):
        alone = adaptive_nodes(PROBLEM.denoise, x[b : b + 1], nodes, tol=0.01)
        assert alone.nodes == [together.nodes[b]]
        np.testing.assert_allclose(alone.x[0], together.x[b], atol=1e-12)


def test_wrong_options_are_errors():
    nodes = grid_nodes(PATHS["edm"], 12, "karras")
    with pytest.raises(OptionError, match="tol > 0"):
        adaptive_nodes(PROBLEM.denoise, start(nodes), nodes, tol=0.0)
