"""What a model reads: the shape of a dataset, as far as an architecture needs to know it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Inputs:
    """The features of one dataset.

    Attributes:
        vocabulary_sizes: per categorical field the number of ids, the unknown id 0 included; ids of
            field f run from 0 to ``vocabulary_sizes[f] - 1``. Empty where there is none.
        num_numericals: number of numerical features, already normalised; 0 where there is none.
        bag_lengths: per categorical field the ids of an impression, which are as many columns in
            field order: 1, or the length of a bag, whose unfilled places hold ids below 0 (see
            `trainables.models.bags`). 1 for all if left out.

    Raises:
        ValueError: a vocabulary or a bag is smaller than 1, ``num_numericals`` is negative, there
            is no feature at all, or not one length per field.
    """

    vocabulary_sizes: tuple[int, ...]
    num_numericals: int
    bag_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.bag_lengths:
            object.__setattr__(self, "bag_lengths", (1,) * len(self.vocabulary_sizes))
        for field, size in enumerate(self.vocabulary_sizes):
            if size < 1:
                raise ValueError(f"vocabulary_sizes[{field}] must be at least 1, got {size}")
        if len(self.bag_lengths) != len(self.vocabulary_sizes):
            raise ValueError(
                f"bag_lengths must have one length for each of {len(self.vocabulary_sizes)} "
                f"fields, got {len(self.bag_lengths)}"
            )
        for field, length in enumerate(self.bag_lengths):
            if length < 1:
                raise ValueError(f"bag_lengths[{field}] must be at least 1, got {length}")
        if self.num_numericals < 0:
            raise ValueError(f"num_numericals must be at least 0, got {self.num_numericals}")
        if not self.vocabulary_sizes and self.num_numericals == 0:
            raise ValueError(
                "a model needs at least one categorical or numerical feature, got none"
            )
