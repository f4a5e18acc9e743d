"""Fields of several ids per impression: the mean of their vectors, or of their indicators.

A bag of length L has L columns of ids, filled from the first on; ids below 0 are padding and count
for nothing. The first place is always filled: a bag without a value holds the unknown id 0 alone,
and so has that id's vector. An id that occurs twice counts twice.

Shape suffixes: B batch, F fields, C columns of ids, E embedding, V rows of a table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bags(nn.Module):
    """The columns of some fields' ids.

    Its buffers are saved with the weights, so that a model built on the meta device loads whole.

    Args:
        lengths: columns of each field, 1 for a field of one id.
        offsets: first row of each field in a table.
    """

    fields_C: Tensor
    starts_F: Tensor
    firsts_C: Tensor
    offsets_C: Tensor

    def __init__(self, lengths: Sequence[int], offsets: Sequence[int]) -> None:
        super().__init__()
        fields = [field for field, length in enumerate(lengths) for _ in range(length)]
        starts = [sum(lengths[:field]) for field in range(len(lengths))]
        self.register_buffer("fields_C", torch.tensor(fields, dtype=torch.int64))
        self.register_buffer("starts_F", torch.tensor(starts, dtype=torch.int64))
        self.register_buffer("firsts_C", torch.tensor([starts[field] for field in fields]))
        self.register_buffer("offsets_C", torch.tensor([offsets[field] for field in fields]))

    def rows(self, ids_BC: Tensor) -> Tensor:
        """Return rows_BC of a table; padding repeats its field's first, so reads no other row."""
        first_BC = ids_BC.index_select(1, self.firsts_C)
        return ids_BC.where(ids_BC >= 0, first_BC) + self.offsets_C

    def weights(self, ids_BC: Tensor, dtype: torch.dtype) -> Tensor:
        """Return weights_BC, the share of each id in its field: 0 for padding, else 1 / ids."""
        filled_BC = ids_BC >= 0
        shape = (ids_BC.shape[0], len(self.starts_F))  # of len() an export would make a constant
        # Counted in integers, whose sums do not depend on the order in which a GPU adds them.
        num_ids_BF = torch.zeros(shape, dtype=torch.int32, device=ids_BC.device)
        num_ids_BF.index_add_(1, self.fields_C, filled_BC.to(torch.int32))
        return filled_BC.to(dtype) / num_ids_BF.index_select(1, self.fields_C)

    def pool(self, table: nn.Embedding, ids_BC: Tensor) -> Tensor:
        """Return vectors_BFE, of each field the mean over its ids.

        The table's gradient is sparse where the table says so.
        """
        num_rows, num_columns = ids_BC.shape
        first_B1 = torch.arange(0, num_rows * num_columns, num_columns, device=ids_BC.device)
        vectors = functional.embedding_bag(
            self.rows(ids_BC).flatten(),
            table.weight,
            (first_B1.unsqueeze(1) + self.starts_F).flatten(),
            mode="sum",
            per_sample_weights=self.weights(ids_BC, table.weight.dtype).flatten(),
            sparse=table.sparse,
        )
        return vectors.view(num_rows, len(self.starts_F), -1)
