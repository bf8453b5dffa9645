"""A model for a command: a name whose weights are published, or a weight file."""

from visionattn.checkpoints import create_pretrained as pretrained

__all__ = ["WEIGHT_FILES", "pretrained"]

WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
