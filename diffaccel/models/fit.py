"""One resumable training loop for every embedded model."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

LossFn = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Budget:
    """How long and how to train. A budget is in steps, not seconds: a rerun gives the same model."""

    steps: int
    lr: float
    batch: int
    warmup: int = 100
    ema: float = 0.998
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear to 2 % over the second half."""
        tail = max(step - self.steps / 2, 0) / (self.steps / 2)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1 - 0.98 * tail)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step depend on (seed, step) alone: a resumed run draws what the whole one does."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}


def _save(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that a run ends after its step with its state saved."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python sets signal handlers in the main thread only
        return
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def fit(
    name: str,
    net: nn.Module,
    loss_fn: LossFn,
    budget: Budget,
    out: Path,
    *,
    minutes: float | None = None,
    save_every: float = 120.0,
    log: Callable[[str], None] = lambda s: print(s, flush=True),
) -> dict:
    """Train `net` in place with AdamW; on return it holds the averaged (EMA) weights. Returns the training receipt.

    State is kept in `out/name.pt`: a second call continues there, with a longer budget too. After `minutes`, on SIGTERM
    or Ctrl-C, the run stops, keeps its state and says `complete: false`.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.pt"
    optimizer = torch.optim.AdamW(net.parameters(), lr=budget.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in net.parameters()]
    start, seconds, curve, budgets = 0, 0.0, [], []
    if file.exists():
        state = torch.load(file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        start, seconds, curve, budgets = state["step"], state["seconds"], state["curve"], state["budgets"]
        log(f"{name}: continue at step {start} of {budget.steps}")
    if asdict(budget) not in budgets:
        budgets.append(asdict(budget))

    begin, saved, window = time.time(), time.time(), []
    step = start

    def store() -> None:
        _save(
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds + time.time() - begin,
                "curve": curve,
                "budgets": budgets,
            },
            file,
        )

    net.train()
    with stop_on_signal() as stop:
        while step < budget.steps and not stop.is_set() and (minutes is None or time.time() - begin < 60 * minutes):
            for group in optimizer.param_groups:
                group["lr"] = budget.rate(step)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(step, step_generator(budget.seed, step))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            decay = min(budget.ema, step / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1 - decay)
            window.append(float(loss.detach()))
            if window[-1] != window[-1]:
                raise FloatingPointError(f"{name}: the loss is NaN at step {step}; the last saved state is in {file}")
            if step % 100 == 0 or step == budget.steps:
                each = (time.time() - begin) / (step - start)
                curve.append([step, round(sum(window) / len(window), 5)])
                log(
                    f"{name}: step {step}/{budget.steps}  loss {curve[-1][1]:.4f}  {each:.3f} s/step  "
                    f"{each * (budget.steps - step) / 60:.0f} min left"
                )
                window.clear()
            if time.time() - saved > save_every:
                store()
                saved = time.time()
    if step > start:
        store()
    with torch.no_grad():
        torch._foreach_copy_(list(net.parameters()), average)
    net.eval()
    total = seconds + time.time() - begin
    return {
        "part": name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": step,
        "complete": step >= budget.steps,
        "seconds": round(total, 1),
        "seconds_per_step": round(total / max(step, 1), 4),
        "threads": torch.get_num_threads(),
        "budgets": budgets,
        "loss_curve": curve,
        "versions": versions(),
    }


def write_receipt(folder: Path, receipt: dict) -> None:
    """`receipt.json` beside the weights; the model card is made from it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


def with_steps(budget: Budget, steps: int | None) -> Budget:
    return budget if steps is None else replace(budget, steps=steps)
