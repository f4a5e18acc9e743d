"""The architectures, by the name that a job file gives them.

A model is a plain nn.Module, built as ``Model(inputs, **settings)`` and called as
``model(ids_BF, numericals_BN) -> logits_BT`` (B batch, F categorical fields, N numericals, T
heads). Column 0 is the logit of p(click); column 1, where there is one, that of p(conversion) over
all impressions. Its settings are the keyword-only parameters of ``__init__``, each annotated and
with a default. `trainables.contract.ModelContract` checks all of it, for a user's own architecture
too.
"""

from torch import nn

from trainables.models.dnn import DNN
from trainables.models.inputs import Inputs
from trainables.models.masknet import MaskNet
from trainables.models.mmoe import MMoE
from trainables.models.ple import PLE
from trainables.models.shared_bottom import SharedBottom

MODELS: dict[str, type[nn.Module]] = {
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "dnn": DNN,
    "masknet": MaskNet,
}

__all__ = ["DNN", "MODELS", "PLE", "Inputs", "MMoE", "MaskNet", "SharedBottom"]
