"""Statistics that the authors of DPM-Solver-v3 publish, as an artifact."""

from __future__ import annotations

import os

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.path import Path
from ..core.quad import Ems
from ..errors import OptionError


def imported(
    folder: str | os.PathLike[str],
    *,
    path: Path,
    prediction_type: str,
    t_start: float,
    t_end: float,
    guidance: float | None = None,
) -> Artifact:
    """An artifact from the statistics that the authors of DPM-Solver-v3 publish.

    Args:
        folder: with `l.npz` (key l) and `sb.npz` (keys s and b), each (M + 1, C, H, W), noisy end first.
        path: of the model.
        prediction_type: of the model, as in its scheduler's config.
        t_start, t_end: the times of the noisy and of the clean end, as the path counts them; the files do not say.
        guidance: scale at which the images were made, for the record.

    Raises:
        OptionError: a missing file or key, or statistics that do not belong together.
    """
    arrays: dict[str, np.ndarray] = {}
    for file, keys in (("l.npz", ("l",)), ("sb.npz", ("s", "b"))):
        name = os.path.join(os.fspath(folder), file)
        if not os.path.isfile(name):
            raise OptionError(f"{name} is missing: published statistics are a folder with l.npz and sb.npz")
        with np.load(name, allow_pickle=False) as data:
            missing = [k for k in keys if k not in data.files]
            if missing:
                raise OptionError(f"{name} has {', '.join(data.files)}, not {', '.join(missing)}")
            arrays |= {k: data[k].astype(np.float32) for k in keys}
    ends_ = path.at(t_start).lam, path.at(t_end).lam
    if not ends_[0] < ends_[1]:
        raise OptionError(
            f"t_start = {t_start} must be noisier than t_end = {t_end} (lam {ends_[0]:.4g}, {ends_[1]:.4g})"
        )
    lam = np.linspace(*ends_, len(arrays["l"]))
    checked = Ems(lam, arrays["l"], arrays["s"], arrays["b"])
    meta = {
        "path": path_identity(path, prediction_type),
        "guidance": guidance,
        "shape": list(checked.shape),
        "receipt": {"result": "imported from the published files; not measured here", "nodes": len(lam) - 1},
    }
    return Artifact("ems", {"lam": lam, **arrays}, meta)
