"""The examples run as written."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-flow"])
def test_swap_scheduler(model, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "swap_scheduler.py"), "--model", model, "--calls", "4"]
    command += ["--order", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "4 model calls" in done.stdout
    assert "unipc(order=3" in done.stdout


def test_calibrate_ems(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "calibrate_ems.py"), "--calls", "2", "--images", "2"]
    command += ["--nodes", "3", "--chosen-on", "2", "--held-out", "8", "--artifact", str(tmp_path / "ems.safetensors")]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "held-out error:" in done.stdout and "2 model calls" in done.stdout


def test_calibrate_dc(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "calibrate_dc.py"), "--calls", "4", "--pairs", "2"]
    command += ["--held-out", "8", "--artifact", str(tmp_path / "dc.safetensors"), "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200 and (tmp_path / "dc.safetensors").exists()
    assert "held-out error" in done.stdout and "4 model calls; wrote" in done.stdout


def test_extrapolate(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "extrapolate.py"), "--steps", "8", "--skip", "h2/s2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "8 nodes, 7 model calls" in done.stdout and "7 model calls on 8 nodes" in done.stdout


def test_quant_cache(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quant_cache.py"), "--steps", "9", "--interval", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "FFFF.F.FF (7 full)" in done.stdout and "plain, 7 calls:" in done.stdout


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-flow"])
def test_restart(model, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "restart.py"), "--model", model, "--calls", "10"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "{name}.png")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "plain: 10 model calls, 0 jumps" in done.stdout and "restart: 10 model calls, 1 jumps" in done.stdout
    assert (tmp_path / "scaled.png").stat().st_size > 200
    assert ("time_shift:" in done.stdout) == (model == "tiny-sd")


def test_paradigms(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "paradigms.py"), "--calls", "8", "--window", "4", "--tol", "0"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "8 rows in 8 sweeps" in done.stdout and "sequential run: 0.0000" in done.stdout


def test_bottleneck(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "bottleneck.py"), "--stages", "few-4"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "stage 1: 8x8, 2 calls" in done.stdout and "compare with a plain run of" in done.stdout


def test_teleport(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "teleport.py"), "--calls", "3"]
    command += ["--artifact", str(tmp_path / "gauss.safetensors"), "--out", str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 200
    assert "skip_to:" in done.stdout and "teleport: 3 model calls from sigma/alpha = 8" in done.stdout


def test_evaluate_fid(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "evaluate_fid.py")]
    small = [*command, "--images", "8", "--calls", "2"]
    done = subprocess.run(small, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KID x1000" in done.stdout and "CLIP score" in done.stdout
    assert "too few images: 8 for 128 features, 256 needed" in done.stdout
    for more in (["--a", str(tmp_path / "absent")], ["--b", str(tmp_path / "absent")]):
        done = subprocess.run([*small, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.strip().startswith("evaluate_fid: no file or folder")


def test_multi_gpu_in_one_process(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "multi_gpu.py"), "--cpu", "--calls", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "64 x 64, made by 1 process(es)" in done.stdout
    assert (tmp_path / "x.png").stat().st_size > 200


def test_own_sampler(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "own_sampler.py"), "--calls", "3"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "{name}.png")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "heavy_ball: 3 model calls" in done.stdout and "k_diffusion: 3 model calls" in done.stdout
    assert (tmp_path / "heavy_ball.png").stat().st_size > 200 and (tmp_path / "k_diffusion.png").stat().st_size > 200


def test_without_diffusers():
    command = [sys.executable, str(ROOT / "examples" / "without_diffusers.py"), "--calls", "8", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error = {
        tuple(line.split(":")[0].split(" calls, ")): float(line.split()[-1]) for line in done.stdout.splitlines()[:6]
    }
    assert error["32", "dpmpp"] < error["32", "ddim"] and error["32", "dpmpp"] < error["8", "dpmpp"] / 5
