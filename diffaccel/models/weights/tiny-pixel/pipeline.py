# For DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True).
from diffaccel.models.pixel import ClassConditionalPipeline  # noqa: F401
