"""Features to vectors: one embedding table for all categorical fields, numericals beside it.

Shape suffixes: B batch, F categorical fields, N numericals, G fields of the output, E embedding.
"""

from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trainables.models.inputs import Inputs
from trainables.models.settings import check_at_least, check_option

Numericals = Literal["project", "embed"]

# Small against what training adds, because the vector of a rare id is mostly this noise: Adam at
# 1e-3 moves a coordinate by as much within ten steps (torch's default of 1 would take a thousand).
# Not as small as FuxiCTR's 1e-4, whose variance of 1e-8 vanishes below the epsilon (1e-5) of
# MaskNet's layer norm and so switches its input off until the vectors have grown.
INITIAL_STD = 0.01


class FeatureEmbedding(nn.Module):
    """Turn ids and numericals into G vectors of width E per impression.

    All categorical fields share one table, field f's rows starting at ``offsets_F[f]``: one lookup
    for all. Numericals enter as one field, a linear projection of all of them (``project``, as in
    MTReclib), or as one field each, value times a learned direction (``embed``).

    Args:
        inputs: the dataset's features.
        embedding_dim: E, at least 1.
        numericals: ``project`` or ``embed``.

    Raises:
        ValueError: a setting out of its range.
    """

    offsets_F: Tensor

    def __init__(self, inputs: Inputs, embedding_dim: int, numericals: Numericals) -> None:
        super().__init__()
        check_at_least("embedding_dim", embedding_dim, 1)
        check_option("numericals", numericals, get_args(Numericals))
        sizes = inputs.vocabulary_sizes
        num_numerical_fields = inputs.num_numericals
        if numericals == "project":
            num_numerical_fields = min(inputs.num_numericals, 1)
        self.num_fields = len(sizes) + num_numerical_fields
        self.embedding_dim = embedding_dim

        self.table: nn.Embedding | None = None
        if sizes:
            self.table = nn.Embedding(sum(sizes), embedding_dim)
            nn.init.normal_(self.table.weight, std=INITIAL_STD)
        # Saved with the weights, so that a model built on the meta device loads whole.
        offsets = [0, *accumulate(sizes[:-1])] if sizes else []
        self.register_buffer("offsets_F", torch.tensor(offsets, dtype=torch.int64))

        self.projection: nn.Linear | None = None
        self.direction_NE: nn.Parameter | None = None
        if inputs.num_numericals and numericals == "project":
            self.projection = nn.Linear(inputs.num_numericals, embedding_dim)
        elif inputs.num_numericals:
            # The scale of nn.Linear(1, E): a numerical is no rare id, every impression trains it.
            self.direction_NE = nn.Parameter(torch.empty(inputs.num_numericals, embedding_dim))
            nn.init.uniform_(self.direction_NE, -1.0, 1.0)

    @property
    def num_outputs(self) -> int:
        """G * E, the width of the concatenated vectors."""
        return self.num_fields * self.embedding_dim

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Look up and project.

        Args:
            ids_BF: ids of any integer type, each within its field's vocabulary. That is the
                dataset's promise and not checked here (a check would wait for the device): an id
                beyond it reads another field's row.
            numericals_BN: normalised values; float32.

        Returns:
            vectors_BGE, categorical fields first.
        """
        vectors: list[Tensor] = []
        if self.table is not None:
            vectors.append(self.table(ids_BF + self.offsets_F))
        if self.projection is not None:
            vectors.append(self.projection(numericals_BN).unsqueeze(1))
        if self.direction_NE is not None:
            vectors.append(numericals_BN.unsqueeze(2) * self.direction_NE)
        return torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
