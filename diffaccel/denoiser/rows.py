"""Rows of a batch: which belong to one image, and a model call on some of them alone."""

from __future__ import annotations

from typing import Any

import torch

from .contract import Call

# Arguments that have one entry a row, where their first dimension says so; everything else is common to all rows.
BY_ROW = frozenset(
    {
        "sample",
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "attention_mask",
        "pooled_projections",
        "guidance",
        "class_labels",
        "timestep_cond",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "img_shapes",
        "txt_seq_lens",
    }
)
COMMON = frozenset({"img_ids", "txt_ids", "image_rotary_emb"})


def images_of(pipe: Any, call: Call) -> list[list[int]] | None:
    """The rows of each image, or None where the batch does not tell.

    Pipelines that name their guidance branches, or call the model once for each, have one row an image; the others
    stack two rows an image (all unconditional ones first) where `do_classifier_free_guidance` is true.
    """
    rows = len(call.sample)
    if rows == 1 or call.named or len(call.run.previous) > 1:
        return [[r] for r in range(rows)]
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None or getattr(pipe, "do_perturbed_attention_guidance", False):
        return None
    if not guided:
        return [[r] for r in range(rows)]
    if rows % 2:
        return None
    return [[r, r + rows // 2] for r in range(rows // 2)]


def sliceable(call: Call) -> str:
    """Why the call cannot be made on some rows alone, or ""."""
    rows = len(call.sample)
    for name, value in call.arguments.items():
        if name in COMMON or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if name in BY_ROW:
            continue
        if isinstance(value, torch.Tensor) and (value.ndim == 0 or len(value) != rows):
            continue
        if isinstance(value, dict) and not value:
            continue
        return f"the argument {name!r} of the model is not known to be one entry a row"
    return ""


def on_rows(call: Call, rows: list[int]) -> Any:
    """The model's output on some rows of the batch."""
    count, pick = len(call.sample), torch.tensor(rows, device=call.sample.device)
    changes = {n: taken(v, pick, rows, count) for n, v in call.arguments.items() if n in BY_ROW}
    return call.forward(changes)


def taken(value: Any, pick: torch.Tensor, rows: list[int], count: int) -> Any:
    """An argument of a call on some rows alone: tensors and lists of one entry a row lose the others.

    Args:
        value: anything; what holds tensors (lists, tuples, dicts) is searched.
        pick: `rows`, as a tensor on the model's device.
        rows: the rows that stay.
        count: rows of the batch.
    """
    if isinstance(value, torch.Tensor):
        return value.index_select(0, pick) if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {k: taken(v, pick, rows, count) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(taken(v, pick, rows, count) for v in value)
    if isinstance(value, list):
        if len(value) == count and not any(isinstance(v, torch.Tensor) for v in value):
            return [value[r] for r in rows]
        return [taken(v, pick, rows, count) for v in value]
    return value
