"""DNN: a perceptron over the concatenated embeddings, one head (Covington et al. 2016).

Source: doi:10.1145/2959100.2959190, the plain ranking network. Shape suffixes: B batch, F fields,
N numericals, D input.
"""

from typing import ClassVar

from torch import Tensor, nn

from trainables.models.embedding import FeatureEmbedding, Numericals
from trainables.models.heads import Head
from trainables.models.inputs import Inputs
from trainables.models.mlp import MLP
from trainables.models.settings import check_dropout, check_units


class DNN(nn.Module):
    """Predict clicks.

    Args:
        inputs: the dataset's features.
        embedding_dim: width of each field's vector.
        hidden_units: hidden layers.
        numericals: one projected field (``project``) or one direction each (``embed``).
        dropout: share of hidden values dropped while training.
        batch_norm: normalise hidden layers over the global batch.

    Raises:
        ValueError: a setting out of its range.
    """

    num_heads: ClassVar[int] = 1

    def __init__(
        self,
        inputs: Inputs,
        *,
        embedding_dim: int = 40,
        hidden_units: tuple[int, ...] = (500, 500, 500),
        numericals: Numericals = "project",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_units("hidden_units", hidden_units)
        check_dropout(dropout)
        self.embedding = FeatureEmbedding(inputs, embedding_dim, numericals)
        self.hidden = MLP(
            self.embedding.num_outputs, hidden_units, dropout=dropout, batch_norm=batch_norm
        )
        self.head = Head(self.hidden.num_outputs)

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return logits_B1: p(click)."""
        input_BD = self.embedding.concatenate(ids_BF, numericals_BN)
        logits_B1: Tensor = self.head(self.hidden(input_BD))
        return logits_B1
