"""What a model reads: the shape of a dataset, as far as an architecture needs to know it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Inputs:
    """The features of one dataset.

    Attributes:
        vocabulary_sizes: per categorical field the number of ids, the unknown id 0 included; ids of
            field f run from 0 to ``vocabulary_sizes[f] - 1``. Empty where there is none.
        num_numericals: number of numerical features, already normalised; 0 where there is none.

    Raises:
        ValueError: a vocabulary is smaller than 1, ``num_numericals`` is negative, or there is no
            feature at all.
    """

    vocabulary_sizes: tuple[int, ...]
    num_numericals: int

    def __post_init__(self) -> None:
        for field, size in enumerate(self.vocabulary_sizes):
            if size < 1:
                raise ValueError(f"vocabulary_sizes[{field}] must be at least 1, got {size}")
        if self.num_numericals < 0:
            raise ValueError(f"num_numericals must be at least 0, got {self.num_numericals}")
        if not self.vocabulary_sizes and self.num_numericals == 0:
            raise ValueError(
                "a model needs at least one categorical or numerical feature, got none"
            )
