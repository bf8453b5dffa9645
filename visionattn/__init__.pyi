# For type checkers: the names of __init__.py, which imports most of them only when they are used.

from typing import Any

from visionattn import blocks as blocks
from visionattn import frozen as frozen
from visionattn import kernels as kernels
from visionattn import mixers as mixers
from visionattn import models as models
from visionattn.checkpoints import load as load
from visionattn.evaluate.retrieval import evaluate_retrieval as evaluate_retrieval
from visionattn.evaluate.retrieval import evaluate_triplets as evaluate_triplets
from visionattn.evaluate.sr import evaluate_sr as evaluate_sr
from visionattn.evaluate.stereo import evaluate_stereo as evaluate_stereo
from visionattn.export.bundle import export_bundle as export_bundle
from visionattn.export.inspect import check as check
from visionattn.frozen.heads import prune_heads as prune_heads
from visionattn.frozen.inspect import inspect as inspect
from visionattn.frozen.tokens import prune_tokens as prune_tokens
from visionattn.predict.flow import flow as flow
from visionattn.predict.flow_files import flow_files as flow_files
from visionattn.predict.restore import upscale as upscale
from visionattn.predict.restore_files import upscale_files as upscale_files
from visionattn.predict.stereo import stereo as stereo
from visionattn.predict.stereo_files import stereo_files as stereo_files
from visionattn.probe.comparing import compare as compare
from visionattn.probe.embedding import embed as embed
from visionattn.search.api import index as index
from visionattn.search.duplicates import duplicates as duplicates
from visionattn.surgery import accelerate as accelerate
from visionattn.surgery import insert as insert
from visionattn.swapping import swap as swap

__version__: str

# Packages that can be called: arena, demo, export, probe and search.
def __getattr__(name: str) -> Any: ...
