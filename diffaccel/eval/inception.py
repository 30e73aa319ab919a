"""The Inception-v3 of FID: the graph of 2015-12-05, for the state dict of torch-fidelity and pytorch-fid.

It is not torchvision's: average pools do not count padding, the last block pools by maximum, there are 1008 logits.
Module names are those of the state dict (arXiv:1512.00567 for the architecture).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import OptionError

VARIABLE = "DIFFACCEL_INCEPTION"
SIZE = 299
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_SHA256 = "6726825d"  # the file name of both projects carries the beginning of the hash
_URLS = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)


class _Conv(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: Any = 1, padding: Any = 0, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


_ROW: dict[str, Any] = dict(kernel=(1, 7), padding=(0, 3))
_COLUMN: dict[str, Any] = dict(kernel=(7, 1), padding=(3, 0))


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(nn.Module):
    def __init__(self, cin: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(cin, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(cin, 48), _Conv(48, 64, 5, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(cin, 64), _Conv(64, 96, 3, 1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 1)
        self.branch_pool = _Conv(cin, pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _B(nn.Module):
    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(cin, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(cin, 64), _Conv(64, 96, 3, 1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    def __init__(self, cin: int, mid: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(cin, 192)
        self.branch7x7_1, self.branch7x7_2 = _Conv(cin, mid), _Conv(mid, mid, **_ROW)
        self.branch7x7_3 = _Conv(mid, 192, **_COLUMN)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(cin, mid), _Conv(mid, mid, **_COLUMN)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(mid, mid, **_ROW), _Conv(mid, mid, **_COLUMN)
        self.branch7x7dbl_5 = _Conv(mid, 192, **_ROW)
        self.branch_pool = _Conv(cin, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class _D(nn.Module):
    def __init__(self, cin: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(cin, 192), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(cin, 192), _Conv(192, 192, **_ROW)
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, **_COLUMN), _Conv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    def __init__(self, cin: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = _Conv(cin, 320)
        self.branch3x3_1, self.branch3x3_2a = _Conv(cin, 384), _Conv(384, 384, (1, 3), (0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), (1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(cin, 448), _Conv(448, 384, 3, 1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), (0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), (1, 0))
        self.branch_pool = _Conv(cin, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(once),
                self.branch3x3_2b(once),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """Normalised float images (N, 3, 299, 299) -> pool3 features (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80), _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a, self.Mixed_6b = _B(288), _C(768, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _C(768, 160), _C(768, 160), _C(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _D(768), _E(1280, False), _E(2048, True)
        self.fc = nn.Linear(2048, 1008)  # in the state dict; pool3 is before it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load(weights: str | Path | None = None) -> Inception:
    """The network with its weights: from `weights`, else $DIFFACCEL_INCEPTION, else through torch-fidelity if that is
    installed (it downloads). Raises OptionError that says which file to get, or what is wrong with the given one."""
    path = weights or os.environ.get(VARIABLE)
    if path:
        state = _read(Path(path))
    elif importlib.util.find_spec("torch_fidelity"):
        extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        state = extractor("inception-v3-compat", ["2048"]).state_dict()
    else:
        raise OptionError(
            f"no Inception weights. Get {_URLS[0]} (or {_URLS[1]}), then pass weights=FILE (--weights FILE) or set "
            f"{VARIABLE}=FILE; or install torch-fidelity. Without them features='tiny-fashion' (--features "
            "tiny-fashion) works, but its numbers are not comparable with published FID"
        )
    net = Inception()
    try:
        net.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} is not the state dict of FID's Inception (2015-12-05; torchvision's weights are another network): "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return net.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise OptionError(f"no Inception weights at {path}; get {_URLS[0]}")
    if _SHA256 in path.name and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(_SHA256):
        raise OptionError(f"{path} is damaged: its SHA-256 does not begin with {_SHA256}; get it again from {_URLS[0]}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OptionError(f"cannot read Inception weights from {path}: {str(error)[:200]}") from None
