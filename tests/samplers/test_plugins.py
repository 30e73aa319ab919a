"""Samplers from installed packages, by the entry point group `diffaccel.samplers`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

MODULE = """
import torch
from itertools import pairwise
from diffaccel import sampler
from diffaccel.core.node import decay
from diffaccel.samplers.kdiffusion import from_k_diffusion


@sampler("hb_euler", order=1, paper="an example")
def hb_euler(x, nodes, predict, noise, *, beta: float = 0.8):
    m = None
    for s, t in pairwise(nodes):
        d = predict(x, s)
        m = d if m is None else beta * d + (1 - beta) * m
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * m
    return x


def sample_plain(model, x, sigmas):
    for s, t in pairwise(sigmas):
        x = x + (x - model(x, s)) / s * (t - s)
    return x


plain = from_k_diffusion(sample_plain, "k_plain")
"""


def install(folder: Path, entries: str) -> None:
    """What pip would leave: a module and its dist-info."""
    (folder / "hb_plugin.py").write_text(MODULE)
    info = folder / "hb_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hb-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[diffaccel.samplers]\n{dedent(entries)}\n")


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    roots = [str(folder), str(Path(__file__).parents[2])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    return subprocess.run([sys.executable, "-c", dedent(code)], env=env, capture_output=True, text=True, check=False)


def test_a_module_a_sampler_object_and_a_broken_plug_in(tmp_path):
    """All in one process, because it imports torch. The broken one is named once and takes nothing else away."""
    install(tmp_path, "loops = hb_plugin\nbad = hb_plugin_that_is_missing\nk = hb_plugin:plain")
    done = python(
        tmp_path,
        """
        import sys, warnings
        import diffaccel as da
        nodes = da.nodes(da.Path.flow(3.0), 5)
        da.trace("ddim", nodes)
        assert "hb_plugin" not in sys.modules  # only looked for when it is asked for
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert len(da.trace("hb_euler", nodes, beta=0.9)) == 5
            assert len(da.trace("k_plain", nodes)) == 5
            assert {"hb_euler", "k_plain", "ddim"} <= set(da.samplers())
        texts = [str(w.message) for w in seen if "plug-in" in str(w.message)]
        assert len(texts) == 1 and "'bad' (hb_plugin_that_is_missing) was skipped" in texts[0], texts
        print("done")
        """,
    )
    assert done.stdout.strip() == "done", done.stderr


def test_a_taken_name_is_refused():
    import diffaccel as da
    from diffaccel.errors import OptionError

    da.samplers()
    with pytest.raises(OptionError, match=r"'ddim' is registered already, by diffaccel\.samplers\.ddim"):
        da.sampler("ddim", order=1)(lambda x, nodes, predict, noise: x)
