"""The training loop: resumable, longer budgets, averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffaccel.models.fit import Budget, fit


def train(out: Path, budget: Budget, **kw):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        x = torch.randn(16, 3, generator=g)
        return (net(x) - x.sum(1, keepdim=True)).pow(2).mean()

    return net, fit("toy", net, loss, budget, out, log=lambda s: None, **kw), loss


def test_it_learns_and_returns_the_average(tmp_path: Path) -> None:
    net, receipt, _ = train(tmp_path, Budget(400, 0.05, 16, warmup=10, ema=0.9))
    assert receipt["complete"] and receipt["steps"] == 400
    assert receipt["loss_curve"][-1][1] < 1e-2 * receipt["loss_curve"][0][1]
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert torch.equal(net.weight, state["average"][0]) and not torch.equal(net.weight, state["net"]["weight"])


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, receipt, _ = train(tmp_path / "a", Budget(60, 0.05, 16))

    class Stop(Exception):
        pass

    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def interrupted(step: int, g: torch.Generator) -> torch.Tensor:
        if step == 37:
            raise Stop
        x = torch.randn(16, 3, generator=g)
        return (net(x) - x.sum(1, keepdim=True)).pow(2).mean()

    with pytest.raises(Stop):
        fit("toy", net, interrupted, Budget(60, 0.05, 16), tmp_path / "b", save_every=0, log=lambda s: None)
    resumed, again, _ = train(tmp_path / "b", Budget(60, 0.05, 16))
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert again["steps"] == receipt["steps"] == 60 and len(again["budgets"]) == 1


def test_train_longer_and_out_of_time(tmp_path: Path) -> None:
    train(tmp_path, Budget(20, 0.05, 16))
    _, receipt, _ = train(tmp_path, Budget(50, 0.05, 16))
    assert receipt["steps"] == 50 and [b["steps"] for b in receipt["budgets"]] == [20, 50]
    _, receipt, _ = train(tmp_path, Budget(90, 0.05, 16), minutes=0)
    assert receipt["steps"] == 50 and not receipt["complete"]


def test_nan_is_an_error(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="NaN at step 1"):
        fit("toy", net, lambda s, g: net.weight.sum() * float("nan"), Budget(5, 0.1, 1), tmp_path)


def test_rate() -> None:
    b = Budget(1000, 1.0, 1, warmup=100)
    assert [round(b.rate(s), 3) for s in (0, 99, 500, 750, 1000)] == [0.01, 1, 1, 0.51, 0.02]
