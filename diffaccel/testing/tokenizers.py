"""Tokenizers made in code: one token a byte, no files, no hub."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["BYTES", "byte_tokenizer", "chat_tokenizer", "clip_tokenizer", "t5_tokenizer"]

BYTES = 256  # size of the byte-level alphabet; special tokens follow it
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def byte_tokenizer(
    *, bos: str | None = None, eos: str = "</s>", pad: str = "<pad>", extra: tuple[str, ...] = (), max_length: int = 77
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: the ids 0 to 255 are the bytes, then `pad`, `bos`, `extra`, `eos`.

    `eos` receives the largest id because CLIP text encoders find the end of the prompt by `argmax` of the ids.
    """
    specials = [s for s in (pad, bos, *extra, eos) if s is not None]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {s: BYTES + i for i, s in enumerate(dict.fromkeys(specials))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    used = [s for s in (bos, eos) if s is not None]
    raw.post_processor = processors.TemplateProcessing(
        single=" ".join([*([bos] if bos else []), "$A", eos]), special_tokens=[(s, vocab[s]) for s in used]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=list(extra),
        model_max_length=max_length,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """With the marks that CLIP text encoders expect at both ends of a prompt."""
    return byte_tokenizer(bos="<|startoftext|>", eos="<|endoftext|>")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """With an end mark only, for T5 and UMT5."""
    return byte_tokenizer(max_length=512)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template and the marks of vision-language models, for Qwen encoders."""
    tokenizer = byte_tokenizer(
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        extra=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
