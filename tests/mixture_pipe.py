"""A diffusers pipeline whose denoiser is an analytic Gaussian mixture in float64, on Stable Diffusion's VP path."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffaccel.core.families import betas
from diffaccel.core.path import Path
from diffaccel.models.pixel import ClassConditionalPipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATH = Path.vp(betas("scaled_linear", BETAS["beta_start"], BETAS["beta_end"], 1000))
SHAPE = (2, 2, 2)


class MixtureUNet(ModelMixin, ConfigMixin):
    """`eps = sigma sum_k gamma_k (x - alpha mu_k)/(alpha^2 var_k + sigma^2)`: three Gaussians on (2, 2, 2) pixels."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: int = 2, num_class_embeds: int = 1, phase: float = 0.3):
        super().__init__()
        k, d = np.arange(3)[:, None], np.arange(int(np.prod(SHAPE)))[None]
        mu = 1.2 * np.cos(1.7 * k + 0.9 * d + phase)
        var = 0.05 + 0.05 * (1 + np.sin(0.8 * k + 1.1 * d + phase))
        self.mu = torch.nn.Parameter(torch.from_numpy(mu), requires_grad=False)
        self.var = torch.nn.Parameter(torch.from_numpy(var), requires_grad=False)
        self.w = torch.nn.Parameter(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), requires_grad=False)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        node = PATH.at(float(timestep))
        flat = sample.double().flatten(1)[:, None]
        spread = node.alpha**2 * self.var.double() + node.sigma**2
        away = flat - node.alpha * self.mu.double()
        share = (self.w.double().log() - 0.5 * (away**2 / spread + spread.log()).sum(-1)).softmax(1)[..., None]
        return ((node.sigma * (share * away / spread).sum(1)).reshape(sample.shape).to(sample.dtype),)


def mixture_pipe(**model):
    """A `ClassConditionalPipeline` of it."""
    pipe = ClassConditionalPipeline(unet=MixtureUNet(**model), scheduler=DDIMScheduler(**BETAS, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe
