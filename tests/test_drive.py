"""What a pipeline's call is given for a batch of prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffaccel.calibrate.captured import Captured
from diffaccel.calibrate.engine import Engine
from diffaccel.drive import Driver, asked
from diffaccel.errors import OptionError
from diffaccel.testing.pipelines import build

SIZE = {"height": 32, "width": 32}
SHORT = {"max_sequence_length": 16, **SIZE}
TEXTS = [
    ("sd15", {"negative_prompt": "blurry", "guidance_scale": 4.0, **SIZE}),
    ("sdxl", {"negative_prompt": "blurry", "negative_prompt_2": "a cat", "prompt_2": "a dog", **SIZE}),
    ("sd3", {"negative_prompt": "blurry", "negative_prompt_3": "a cat", "prompt_2": "a dog", **SHORT}),
    ("flux", {"prompt_2": "a dog", **SHORT}),
    ("qwen_image", {"negative_prompt": "blurry", "true_cfg_scale": 2.0, **SIZE}),
]


@pytest.mark.parametrize("name, options", TEXTS, ids=[name for name, _ in TEXTS])
@pytest.mark.parametrize("count", [1, 2])
def test_texts_beside_the_prompt_serve_every_image(name, options, count):
    """As if the pipeline had been called with lists; and each of them counts."""
    pipe, prompts = build(name), ["a red fox", "a blue coat"][:count]

    def made(given):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        return Driver(pipe, given)(prompts, generators, 2).images

    images = made(options)
    texts = [k for k, v in options.items() if isinstance(v, str)]
    assert texts and np.array_equal(images, made(options | {k: [options[k]] * count for k in texts}))
    for text in texts:
        assert not np.array_equal(images, made(options | {text: "a house"})), text


@pytest.mark.parametrize("batch", [1, 2])
def test_calibrations_give_every_image_its_negative_prompt(batch):
    def ran(text):
        call = {"negative_prompt": text, **SIZE}
        engine = Engine(build("sd15"), ["a fox", "a hat"], guidance=4.0, call=call, batch=batch, progress=False)
        scheduler = Captured.of(engine.pipe.scheduler.config, "unipc", see=lambda *_: None)
        return torch.cat([engine.run(b, scheduler, 2) for b in engine.batches(0, 2)])

    images = ran("blurry")
    assert len(images) == 2 and all(not torch.equal(x, y) for x, y in zip(images, ran("a house"), strict=True))


def test_what_is_no_text_of_a_prompt_stays_as_it_is():
    options = {"negative_prompt": None, "system_prompt": "be brief", "prompt_embeds": 1, "eta": 0.5}
    assert asked("prompt", ("a", "b"), options) == {"prompt": ["a", "b"], **options}
    assert asked("prompt", ("a", "b"), {"prompt_2": ["c", "d"]})["prompt_2"] == ["c", "d"]
    assert asked("class_labels", ("1", "2"), {"guidance_scale": 4.0}) == {"class_labels": [1, 2], "guidance_scale": 4.0}
    with pytest.raises(OptionError, match="must be a number, got 'fox'"):
        asked("class_labels", ("fox",), {})
