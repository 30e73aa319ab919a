"""`ClassConditionalPipeline`: the plain diffusers loop for a class-conditional pixel UNet.

The stock `DDPMPipeline` cannot hand class labels to its UNet. This one can, and otherwise does what every stock
pipeline does, so that any scheduler can be tried in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """UNet2DModel with class embedding + any diffusers scheduler; one UNet call per image and step, no guidance."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _labels(self, class_labels, batch_size: int, device) -> torch.Tensor:
        classes = self.unet.config.num_class_embeds
        if class_labels is None:
            return torch.arange(batch_size, device=device) % classes
        labels = torch.as_tensor(class_labels, device=device).long().flatten()
        if not labels.numel() or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(f"class_labels must lie in 0..{classes - 1}, got {class_labels!r}")
        return labels

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ):
        """One image per label. Without labels: `batch_size` images of classes 0, 1, 2, ...

        latents: starting noise (B, C, H, W) of unit variance. output_type: 'pil', 'np' (B, H, W, C in [0, 1]), 'pt'
        (B, C, H, W in [0, 1]) or 'latent' (the raw sample in [-1, 1]). callback_on_step_end(pipe, i, t, {"latents": x})
        may return a dict with new latents.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; known: pil, np, pt, latent")
        unknown = set(callback_on_step_end_tensor_inputs) - {"latents"}
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs can name 'latents' only, not {sorted(unknown)}")
        device, dtype = self._execution_device, self.unet.dtype
        labels = self._labels(class_labels, batch_size, device)
        config = self.unet.config
        size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
        shape = (len(labels), config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"{len(generator)} generators for {len(labels)} images")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")

        grid = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        if grid:
            self.scheduler.set_timesteps(**grid, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        accepts = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in (("generator", generator), ("eta", eta)) if k in accepts}

        self._num_timesteps, self._interrupt = len(self.scheduler.timesteps), False
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                noise = self.unet(self.scheduler.scale_model_input(x, t), t, class_labels=labels, return_dict=False)[0]
                x = self.scheduler.step(noise, t, x, **extra, return_dict=False)[0].to(dtype)
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, i, t, {"latents": x}) or {}).pop("latents", x)
                bar.update()
        self.maybe_free_model_hooks()
        images = x
        if output_type != "latent":
            images = (x.float() / 2 + 0.5).clamp(0, 1)
            if output_type in ("np", "pil"):
                images = images.permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
