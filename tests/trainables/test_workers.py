from collections.abc import Callable
from pathlib import Path

import torch

from trainables import Workers


def test_a_worker_on_its_own_has_everything() -> None:
    workers = Workers(device=torch.device("cpu"))
    assert (workers.rank, workers.size) == (0, 1)
    assert workers.share_of(5) == slice(0, 5)
    rows_BT = torch.arange(10.0).view(5, 2)
    assert workers.gather_rows(rows_BT, 5) is rows_BT


def test_shares_put_together_are_the_whole_in_order(
    run_ranks: Callable[..., tuple[dict[str, torch.Tensor], ...]], tmp_path: Path
) -> None:
    one, two = run_ranks("workers", tmp_path)
    assert list(one) == list(two) == [f"{num_rows} rows" for num_rows in range(7)]
    for num_rows, rows_BT in enumerate(two.values()):
        assert torch.equal(rows_BT, torch.arange(2.0 * num_rows).view(num_rows, 2))
        assert torch.equal(rows_BT, one[f"{num_rows} rows"])
