"""A stopped search, alignment or AYS run goes on to the same artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.engine import Engine
from diffaccel.errors import OptionError
from diffaccel.testing import pipelines

pytestmark = pytest.mark.filterwarnings("ignore::diffaccel.errors.ArtifactWarning")
PROMPTS = ["a red fox", "a blue car", "two boats", "a hat", "snow", "a tree", "an owl", "the sea"]
SMALL: dict[str, Any] = {"samples": 4, "holdout": 4, "teacher_steps": 16, "rivals": None, "progress": False}
MORE: dict[str, dict[str, Any]] = {
    "search": {"trials": 4, "beam_width": 1, "spaces": "x0"},
    "align": {"rounds": 2},
    "ays": {"until": 1.0},
}


def run(kind: str, **options: Any) -> Artifact:
    drop = ("prompt", "num_inference_steps", "output_type", "generator")
    call = {k: v for k, v in pipelines.call_kwargs("sd15").items() if k not in drop}
    made: Artifact = getattr(calibrate, kind)(
        pipelines.build("sd15"), PROMPTS, 3, **{**SMALL, **MORE[kind], **call, **options}
    )
    return made


@pytest.mark.parametrize(("kind", "stopped"), [("search", 9), ("align", 8), ("ays", 7)])
def test_a_stopped_run_goes_on(kind: str, stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out = run(kind), tmp_path / "made.safetensors"
    real, count = Engine.run, [0]

    def failing(self: Engine, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == stopped:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            run(kind, out=out)
    assert not out.exists() and (tmp_path / "made.safetensors.partial").exists()
    with pytest.raises(OptionError, match="another calibration"):
        run(kind, out=out, holdout=5)
    made = run(kind, out=out)
    assert list(tmp_path.iterdir()) == [out] and Artifact.load(out, kind) == made
    assert made.meta["cost"]["calls"] <= wanted.meta["cost"]["calls"] + 4 * 17  # a piece of work was done twice
    for name, values in wanted.tensors.items():
        assert made.tensors[name] == pytest.approx(values, abs=1e-6), name
