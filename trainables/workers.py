"""The workers that train one trial together: their device, and what they say to each other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Workers"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One worker's view of its group.

    Attributes:
        device: where this worker's data and model live.
        group: the process group of the device's collectives; None for a worker on its own.
    """

    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of workers, at least 1."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This worker's place, from 0 to size - 1."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def share_of(self, num_rows: int) -> slice:
        """Cut `num_rows` into `size` consecutive shares, equal but for the last ones; give ours."""
        length = -(-num_rows // self.size)
        return slice(min(self.rank * length, num_rows), min((self.rank + 1) * length, num_rows))

    def gather_rows(self, share_BT: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Put every worker's share (see `share_of`) together again, on every worker.

        Args:
            share_BT: this worker's rows.
            num_rows: rows over all workers.

        Returns:
            The rows of all workers in order, (num_rows, T).
        """
        if self.size == 1:
            return share_BT
        length = -(-num_rows // self.size)
        padded = share_BT.new_zeros(length, *share_BT.shape[1:])
        padded[: len(share_BT)] = share_BT
        gathered = padded.new_empty(self.size * length, *share_BT.shape[1:])
        dist.all_gather_single(gathered, padded, group=self.group)
        return gathered[:num_rows]
