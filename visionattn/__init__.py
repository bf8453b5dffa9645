"""A compact vision-model zoo built from efficient attention blocks.

Importing the package registers every model name (all begin with `va_`) in timm's registry:

    import timm, visionattn
    model = timm.create_model("va_minimal_vit_tiny_patch16_224")
"""

__version__ = "0.1.0"

from visionattn import blocks, kernels, mixers, models, moved
from visionattn.checkpoints import load
from visionattn.lazy import lazily
from visionattn.surgery import accelerate, insert
from visionattn.swapping import swap

moved.install()

# Functions, including those of each command. Their modules are imported when they are used.
_COMMANDS = {
    "arena": "visionattn.arena",
    "check": "visionattn.export.inspect",
    "compare": "visionattn.probe.comparing",
    "demo": "visionattn.demo",
    "duplicates": "visionattn.search.duplicates",
    "embed": "visionattn.probe.embedding",
    "evaluate_retrieval": "visionattn.evaluate.retrieval",
    "evaluate_sr": "visionattn.evaluate.sr",
    "evaluate_stereo": "visionattn.evaluate.stereo",
    "evaluate_triplets": "visionattn.evaluate.retrieval",
    "export": "visionattn.export",
    "export_bundle": "visionattn.export.bundle",
    "flow": "visionattn.predict.flow",
    "flow_files": "visionattn.predict.flow_files",
    "index": "visionattn.search.api",
    "inspect": "visionattn.frozen.inspect",
    "probe": "visionattn.probe",
    "prune_heads": "visionattn.frozen.heads",
    "prune_tokens": "visionattn.frozen.tokens",
    "search": "visionattn.search",
    "stereo": "visionattn.predict.stereo",
    "stereo_files": "visionattn.predict.stereo_files",
    "upscale": "visionattn.predict.restore",
    "upscale_files": "visionattn.predict.restore_files",
}
__getattr__ = lazily(__name__, {**_COMMANDS, "frozen": "visionattn.frozen"})

__all__ = ["accelerate", "blocks", "insert", "kernels", "load", "mixers", "models", "swap", *_COMMANDS]
