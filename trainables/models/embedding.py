"""Features to vectors: one embedding table for all categorical fields, numericals beside it.

Shape suffixes: B batch, F id columns (one per categorical field, as many as a bag is long), N
numericals, G fields of the output, E embedding, D = G * E; of folded blocks: C id columns, V rows
of the table, R rows of one block, M numericals and 1s.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.bags import Bags
from trainables.models.folded_input import Features, FoldedInput, Indicators, cast_as_read
from trainables.models.gather import look_up, sorts_rows
from trainables.models.inputs import Inputs
from trainables.models.mlp import Linear
from trainables.models.settings import check_at_least, check_option

Numericals = Literal["project", "embed"]

# Small against what training adds, because the vector of a rare id is mostly this noise: Adam at
# 1e-3 moves a coordinate by as much within ten steps (torch's default of 1 would take a thousand).
# Not as small as FuxiCTR's 1e-4, whose variance of 1e-8 vanishes below the epsilon (1e-5) of
# MaskNet's layer norm and so switches its input off until the vectors have grown.
INITIAL_STD = 0.01

GPU_UNSORTED_LOOKUPS = 3_072
"""Up to so many lookups torch adds their gradients up on a GPU as they come, in their own type."""


class FeatureEmbedding(nn.Module):
    """Turn ids and numericals into G vectors of width E per impression.

    All categorical fields share one table, field f's rows starting at ``offsets_F[f]``: one lookup
    for all. A bag's vector is the mean over its ids. Numericals enter as one field, a linear
    projection of all of them (``project``, as in MTReclib), or as one field each, value times a
    learned direction (``embed``).

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
        self.vocabulary_sizes = sizes
        self.bag_lengths = inputs.bag_lengths
        self.folding: FoldedBlocks | None = None

        self.table: nn.Embedding | None = None
        if sizes:
            # Drawn twice, as nn.Embedding and nn.init.normal_ do, so that a seed keeps its weights.
            # Those would load torch's compiler on the meta device, for two seconds.
            torch.randn(sum(sizes), embedding_dim)
            weight_VE = torch.randn(sum(sizes), embedding_dim).mul_(INITIAL_STD)
            self.table = nn.Embedding.from_pretrained(weight_VE, freeze=False)  # type: ignore[no-untyped-call]
        # Saved with the weights, so that a model built on the meta device loads whole.
        offsets = [0, *accumulate(sizes[:-1])] if sizes else []
        self.register_buffer("offsets_F", torch.tensor(offsets, dtype=torch.int64))
        self.bags = _bags(range(len(sizes)), inputs.bag_lengths, offsets)

        self.projection: Linear | None = None
        self.direction_NE: nn.Parameter | None = None
        if inputs.num_numericals and numericals == "project":
            self.projection = Linear(inputs.num_numericals, embedding_dim)
        elif inputs.num_numericals:
            # The scale of nn.Linear(1, E): a numerical is no rare id, every impression trains it.
            self.direction_NE = nn.Parameter(torch.empty(inputs.num_numericals, embedding_dim))
            nn.init.uniform_(self.direction_NE, -1.0, 1.0)

    @property
    def num_outputs(self) -> int:
        """G * E, the width of the concatenated vectors."""
        return self.num_fields * self.embedding_dim

    @property
    def block_widths(self) -> tuple[int, ...]:
        """Widths of the blocks that can be folded: each categorical field, then all numericals."""
        num_tables = len(self.vocabulary_sizes)
        numericals = (self.num_fields - num_tables) * self.embedding_dim
        widths = (self.embedding_dim,) * num_tables
        return (*widths, numericals) if numericals else widths

    @property
    def block_indicators(self) -> tuple[int, ...]:
        """Indicators of each block, where it is folded."""
        if self.projection is not None:
            return (*self.vocabulary_sizes, self.projection.in_features + 1)
        if self.direction_NE is not None:
            return (*self.vocabulary_sizes, len(self.direction_NE))
        return self.vocabulary_sizes

    def fold(self, blocks: Sequence[int]) -> None:
        """Leave these blocks to the first linear layer (see `trainables.models.folded_input`).

        Changes how `concatenate` is computed, not what it means; () is the plain form, that of a
        new model. Call it again after a move to another device.
        """
        self.folding = FoldedBlocks(self, blocks) if blocks else None

    def forward(self, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Look up and project.

        Args:
            ids_BF: ids of any integer type, each within its field's vocabulary, or below 0 at a
                place that a bag does not fill. That is the dataset's promise and not checked here
                (a check would wait for the device): an id beyond it reads another field's row.
            numericals_BN: normalised values; float32.

        Returns:
            vectors_BGE, categorical fields first.
        """
        return _side_by_side(self._vectors(ids_BF, numericals_BN))

    def concatenate(
        self, ids_BF: Tensor, numericals_BN: Tensor, vectors_BGE: Tensor | None = None
    ) -> Features:
        """Return x_BD, all vectors side by side, in the form that a first linear layer reads.

        Args:
            ids_BF: as in `forward`.
            numericals_BN: as in `forward`.
            vectors_BGE: what `forward` returned for them, if it has been called.
        """
        if self.folding is not None:
            return self.folding.concatenate(self, ids_BF, numericals_BN, vectors_BGE)
        if vectors_BGE is not None:
            return cast_as_read(vectors_BGE).flatten(1)
        # Converted before they are put together: fewer bytes to move, there and back.
        vectors = [
            cast_as_read(part) for part in self._vectors(ids_BF, numericals_BN, as_read=True)
        ]
        return _side_by_side(vectors).flatten(1)

    def _vectors(
        self, ids_BF: Tensor, numericals_BN: Tensor, *, as_read: bool = False
    ) -> list[Tensor]:
        """Return the vectors_BGE of the categorical fields, and of the numericals."""
        vectors: list[Tensor] = []
        if self.table is not None:
            vectors.append(self._categorical_vectors(ids_BF, as_read=as_read))
        if self.projection is not None or self.direction_NE is not None:
            vectors.append(self.numerical_vectors(numericals_BN))
        return vectors

    def _categorical_vectors(self, ids_BF: Tensor, *, as_read: bool) -> Tensor:
        """Return the vectors, one per categorical field, without the numericals."""
        assert self.table is not None
        if self.bags is not None:
            return self.bags.pool(self.table, ids_BF)
        return self.look_up(ids_BF + self.offsets_F, as_read=as_read)

    def look_up(self, rows: Tensor, *, as_read: bool) -> Tensor:
        """Return the table's vectors of these rows.

        Args:
            rows: any shape.
            as_read: in the type that a first layer reads, where the gradients of a row are added up
                in float32 all the same: the table is converted, not all that is looked up in it.

        Returns:
            The vectors, with E as a last dimension.
        """
        assert self.table is not None
        if self.table.sparse:
            vectors: Tensor = self.table(rows)
            return vectors
        table_VE = self.table.weight
        if as_read and _converts_table(table_VE, rows):
            table_VE = cast_as_read(table_VE)
        if rows.is_cuda:
            # The gradient of index_select would depend on the order of its atomics; this one sorts
            # the rows, narrow ones in half the time.
            return functional.embedding(rows.int(), table_VE)
        return look_up(table_VE, rows.flatten()).view(*rows.shape, table_VE.shape[1])

    def numerical_vectors(self, numericals_BN: Tensor) -> Tensor:
        """Return the vectors_BGE of the numericals alone."""
        if self.direction_NE is not None:
            return numericals_BN.unsqueeze(2) * self.direction_NE
        assert self.projection is not None
        vector_BE: Tensor = self.projection(numericals_BN)
        return vector_BE.unsqueeze(1)


class FoldedBlocks:
    """Which blocks of an embedding are folded, and the indices for it, on the embedding's device.

    Args:
        embedding: the embedding.
        blocks: places in its ``block_widths``.

    Raises:
        ValueError: a block that the embedding does not have.
    """

    def __init__(self, embedding: FeatureEmbedding, blocks: Sequence[int]) -> None:
        num_blocks = len(embedding.block_widths)
        if not set(blocks) <= set(range(num_blocks)):
            raise ValueError(f"blocks must be within 0 to {num_blocks - 1}, got {list(blocks)}")
        sizes = embedding.vocabulary_sizes
        device = embedding.offsets_F.device
        self.fields = [field for field in range(len(sizes)) if field in blocks]
        self.sizes = [sizes[field] for field in self.fields]
        self.numericals = len(sizes) in blocks
        self.plain_fields = [field for field in range(len(sizes)) if field not in blocks]
        starts = [0, *accumulate(self.sizes)]
        offsets = [0, *accumulate(sizes)]
        rows = [row for f in self.fields for row in range(offsets[f], offsets[f + 1])]
        self.starts = torch.tensor(starts[:-1], dtype=torch.int64, device=device)
        self.plain_places = torch.tensor(self.plain_fields, dtype=torch.int64, device=device)
        plain_offsets = [offsets[field] for field in self.plain_fields]
        self.plain_offsets = torch.tensor(plain_offsets, dtype=torch.int64, device=device)
        self.rows_V = torch.tensor(rows, dtype=torch.int64, device=device)
        lengths = embedding.bag_lengths
        self.folded_columns = _columns(self.fields, lengths, device)
        self.plain_columns = _columns(self.plain_fields, lengths, device)
        self.folded_bags = _bags(self.fields, lengths, starts, device)
        self.plain_bags = _bags(self.plain_fields, lengths, plain_offsets, device)

    def concatenate(
        self,
        embedding: FeatureEmbedding,
        ids_BF: Tensor,
        numericals_BN: Tensor,
        vectors_BGE: Tensor | None = None,
    ) -> FoldedInput:
        """Return the folded form of x_BD; `vectors_BGE` as in `FeatureEmbedding.concatenate`."""
        if vectors_BGE is None:
            plain_BY = self._plain(embedding, ids_BF, numericals_BN)
        else:
            plain_BY = self._plain_of(embedding, vectors_BGE)
        return FoldedInput(
            widths=embedding.block_widths,
            vectors=self._vectors(embedding),
            indicators=self._indicators(embedding, ids_BF, numericals_BN),
            plain_BY=plain_BY,
        )

    def _vectors(self, embedding: FeatureEmbedding) -> dict[int, Tensor]:
        vectors: dict[int, Tensor] = {}
        if self.fields and embedding.table is not None:
            vectors_VE = cast_as_read(embedding.look_up(self.rows_V, as_read=True))
            vectors |= dict(zip(self.fields, torch.split(vectors_VE, self.sizes), strict=True))
        if self.numericals:
            place = len(embedding.vocabulary_sizes)
            if embedding.projection is not None:
                weight_EN, bias_E = embedding.projection.weight, embedding.projection.bias
                vectors_RE = torch.cat([weight_EN.t(), bias_E.unsqueeze(0)])
            else:
                assert embedding.direction_NE is not None
                vectors_RE = embedding.direction_NE
            vectors[place] = cast_as_read(vectors_RE)
        return vectors

    def _indicators(
        self, embedding: FeatureEmbedding, ids_BF: Tensor, numericals_BN: Tensor
    ) -> Indicators:
        ids = ids_BF.index_select(1, self.folded_columns) if self.plain_fields else ids_BF
        weights_BC = None
        if self.folded_bags is None:
            rows_BC = ids + self.starts
        else:
            # A mean of vectors is a product with the mean of their indicators.
            rows_BC = self.folded_bags.rows(ids)
            weights_BC = self.folded_bags.weights(ids, numericals_BN.dtype)
        parts = [numericals_BN] if self.numericals else []
        num_ones = 2 if self.numericals and embedding.projection is not None else 1
        ones = numericals_BN.new_ones(len(numericals_BN), num_ones)
        return Indicators(
            rows_BC=rows_BC,
            weights_BC=weights_BC,
            num_rows=sum(self.sizes),
            dense_BM=cast_as_read(torch.cat([*parts, ones], dim=1)),
        )

    def _plain(
        self, embedding: FeatureEmbedding, ids_BF: Tensor, numericals_BN: Tensor
    ) -> Tensor | None:
        blocks: list[Tensor] = []
        if self.plain_fields and embedding.table is not None:
            ids = ids_BF.index_select(1, self.plain_columns) if self.fields else ids_BF
            if self.plain_bags is None:
                blocks.append(embedding.look_up(ids + self.plain_offsets, as_read=True))
            else:
                blocks.append(self.plain_bags.pool(embedding.table, ids))
        if not self.numericals and len(embedding.block_widths) > len(embedding.vocabulary_sizes):
            blocks.append(embedding.numerical_vectors(numericals_BN))
        return _flattened(blocks)

    def _plain_of(self, embedding: FeatureEmbedding, vectors_BGE: Tensor) -> Tensor | None:
        """Take the plain blocks out of vectors that are there already."""
        num_tables = len(embedding.vocabulary_sizes)
        blocks = [vectors_BGE.index_select(1, self.plain_places)] if self.plain_fields else []
        if not self.numericals and len(embedding.block_widths) > num_tables:
            blocks.append(vectors_BGE[:, num_tables:])
        return _flattened(blocks)


def _side_by_side(vectors: list[Tensor]) -> Tensor:
    return torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]


def _flattened(blocks: list[Tensor]) -> Tensor | None:
    return _side_by_side([cast_as_read(block) for block in blocks]).flatten(1) if blocks else None


def _converts_table(table_VE: Tensor, rows: Tensor) -> bool:
    """Whether the table is converted, not the vectors that are looked up.

    Where it has fewer rows than that, and their gradients are added up in float32 in any type.
    """
    if rows.is_cuda and rows.numel() <= GPU_UNSORTED_LOOKUPS:
        return False
    return sorts_rows(table_VE, rows.numel())


def _columns(fields: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the columns of these fields' ids among those of all fields."""
    starts = [0, *accumulate(lengths)]
    columns = [column for f in fields for column in range(starts[f], starts[f + 1])]
    return torch.tensor(columns, dtype=torch.int64, device=device)


def _bags(
    fields: Sequence[int],
    lengths: Sequence[int],
    offsets: Sequence[int],
    device: torch.device | None = None,
) -> Bags | None:
    """Return the bags among these fields, each with its first row; None if all hold one id."""
    own = [lengths[field] for field in fields]
    return Bags(own, offsets).to(device) if any(length > 1 for length in own) else None
