"""One LightningModule per task, and the command line over them."""

from visionattn.errors import require
from visionattn.lightning_import import import_lightning

import_lightning("lightning.pytorch")
require("torchmetrics", "train")
