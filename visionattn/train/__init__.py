"""One LightningModule per task, and the command line over them."""

from visionattn.errors import require

for _package in ("lightning.pytorch", "torchmetrics"):
    require(_package, "train")
