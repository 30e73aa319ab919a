"""Does an artifact belong to this pipeline?"""

from __future__ import annotations

import os
from typing import Any

from ..artifact import Artifact, check_path
from ..identity import check_guidance, check_model
from ..schedulers.from_config import path_of, read


def check(
    artifact: Artifact | str | os.PathLike[str], pipe: Any, *, guidance: float | None = None, strict: bool = True
) -> Artifact:
    """Raise, or warn, where an artifact does not fit a pipeline.

    Path and prediction type, the denoiser's class, config and weights, and its adapters are compared. A scheduler
    built with `from_config(..., artifact=F, pipe=pipe)` does the same; call this after loading a LoRA.

    Args:
        artifact: or its file.
        pipe: with the scheduler that its checkpoint came with, or one of ours.
        guidance: the scale that will be used; more than a factor of 2 from the artifact's is a warning.
        strict: other weights are an error; if False, a warning.

    Returns:
        the artifact.

    Raises:
        ArtifactError: with both sides.
    """
    found = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    settings = read(pipe.scheduler.config).settings
    check_path(found, path_of(settings), settings["prediction_type"])
    check_model(found, pipe, strict=strict)
    if guidance is not None:
        check_guidance(found, guidance)
    return found
