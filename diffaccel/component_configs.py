"""What the configs of a pipeline's components say: with the weights, all that an image depends on beside the run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# not the model: where it came from, what wrote it, and the dtype that it was asked for in
NOISE = {"transformers_version", "name_or_path", "architectures", "dtype", "torch_dtype"}
OF_TOKENIZERS = ("model_max_length", "padding_side")


def component_configs(pipe: Any) -> dict[str, Any]:
    """The configs of all components but the scheduler's, as JSON without notes, paths and versions.

    Of a tokenizer: its length, its side of padding and a hash of its vocabulary. `pipeline`: settings of its own.
    """
    found = {name: _config(part) for name, part in sorted(pipe.components.items()) if name != "scheduler"}
    own = {k: v for k, v in pipe.config.items() if k not in pipe.components}
    return {name: plain for name, config in {**found, "pipeline": own}.items() if (plain := _plain(config))}


def _config(part: Any) -> dict[str, Any]:
    if hasattr(part, "get_vocab"):
        words = hashlib.sha256(json.dumps(part.get_vocab(), sort_keys=True).encode()).hexdigest()
        return {"vocabulary": words, **{k: getattr(part, k, None) for k in OF_TOKENIZERS}}
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):  # of transformers
        return dict(config.to_dict())
    if config is None and hasattr(part, "to_dict"):  # of its image processors
        return dict(part.to_dict())
    return dict(config or {})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in NOISE}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
