"""Looking up and summing rows equals the products that they stand for."""

import pytest
import torch

from trainables.models import Inputs
from trainables.models.embedding import FeatureEmbedding
from trainables.models.gather import by_row, look_up, sum_by_row, sum_rows


@pytest.mark.parametrize("num_rows", [1, 7, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_looking_up_has_the_gradient_of_indexing(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows_R = torch.randint(num_rows, (50,), generator=generator)
    # Small whole numbers, whose sums bfloat16 holds exactly.
    grad_RE = torch.randint(-2, 3, (50, 3), generator=generator).to(dtype)
    table_VE = torch.randn(num_rows, 3, generator=generator).to(dtype).requires_grad_()
    expected_VE = torch.zeros(num_rows, 3, dtype=dtype).index_add(0, rows_R, grad_RE)
    vectors_RE = look_up(table_VE, rows_R)
    vectors_RE.backward(grad_RE)  # type: ignore[no-untyped-call]
    assert torch.equal(vectors_RE, table_VE[rows_R])
    assert table_VE.grad is not None
    assert torch.equal(table_VE.grad, expected_VE)


def test_a_row_read_often_adds_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    grad_RE = torch.rand(5_000, 8, generator=generator).bfloat16()
    table_VE = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    rows_R = torch.arange(5_000) % 2
    look_up(table_VE, rows_R).backward(grad_RE)  # type: ignore[no-untyped-call]
    expected_VE = torch.zeros(2, 8, dtype=torch.float64).index_add(0, rows_R, grad_RE.double())
    assert table_VE.grad is not None
    torch.testing.assert_close(table_VE.grad.double(), expected_VE, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("num_ids", [50, 5_000])
def test_a_table_of_a_bfloat16_model_adds_up_in_float32(num_ids: int) -> None:
    torch.manual_seed(0)
    embedding = FeatureEmbedding(Inputs(vocabulary_sizes=(num_ids,), num_numericals=0), 8, "embed")
    assert embedding.table is not None
    grad_BD = torch.rand(2_000, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        vectors_BD = embedding.concatenate(torch.zeros(2_000, 1, dtype=torch.int8), grad_BD[:, :0])
    assert isinstance(vectors_BD, torch.Tensor)
    assert vectors_BD.dtype == torch.bfloat16
    vectors_BD.backward(grad_BD)  # type: ignore[no-untyped-call]
    assert embedding.table.weight.grad is not None
    torch.testing.assert_close(
        embedding.table.weight.grad[0], grad_BD.float().sum(0), rtol=2**-8, atol=0.0
    )


def test_a_gradient_may_come_in_any_layout() -> None:
    table_VE = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    grad_ER = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    look_up(table_VE, torch.tensor([1, 0, 1])).backward(grad_ER.t())  # type: ignore[no-untyped-call]
    assert table_VE.grad is not None
    assert table_VE.grad.tolist() == [[2.0, 5.0], [4.0, 10.0]]


def test_places_are_sorted_by_the_row_that_they_read() -> None:
    places_R, starts_V = by_row(torch.tensor([3, 0, 3, 1]), 5)
    assert places_R.tolist() == [1, 3, 0, 2]
    assert starts_V.tolist() == [0, 1, 2, 2, 4]


@pytest.mark.parametrize("num_rows", [1 << 15, (1 << 15) + 1, 100_000])
def test_the_last_rows_of_a_large_table_are_sorted_last(num_rows: int) -> None:
    rows_R = torch.tensor([num_rows - 1, 0, num_rows - 2])
    assert by_row(rows_R, num_rows)[0].tolist() == [1, 2, 0]


def test_rows_that_nothing_reads_sum_to_nothing() -> None:
    table = torch.tensor([[1.0], [2.0], [4.0]])
    places_R, starts_V = by_row(torch.tensor([2, 0, 2]), 4)
    assert sum_rows(table, places_R, starts_V, None).tolist() == [[2.0], [0.0], [5.0], [0.0]]


@pytest.mark.parametrize("width", [1, 128, 129, 300])
def test_strips_of_columns_add_up_to_the_whole(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-9, 10, (11, width), generator=generator).float()
    rows_BC = torch.randint(11, (6, 4), generator=generator)
    wanted = table[rows_BC].sum(1)
    assert torch.equal(sum_rows(table, rows_BC, None, None), wanted)
    whole = torch.full((6, width + 2), torch.nan)
    sum_rows(table, rows_BC, None, None, out=whole[:, 1:-1])
    assert torch.equal(whole[:, 1:-1], wanted)
    assert whole[:, [0, -1]].isnan().all()


@pytest.mark.parametrize("num_rows", [1, 40, 100_000])
@pytest.mark.parametrize("width", [1, 3, 200])
def test_summing_by_row_is_what_coalescing_does(num_rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows_R = torch.randint(num_rows, (50,), generator=generator)
    vectors_RE = torch.randn(50, width, generator=generator)
    rows_U, sums_UE = sum_by_row(rows_R, vectors_RE, num_rows)
    expected = torch.sparse_coo_tensor(
        rows_R[None], vectors_RE, (num_rows, width), check_invariants=True
    ).coalesce()
    assert torch.equal(rows_U, expected.indices()[0])
    torch.testing.assert_close(sums_UE, expected.values())


def test_nothing_sums_to_no_rows() -> None:
    rows_U, sums_UE = sum_by_row(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), 5)
    assert rows_U.tolist() == []
    assert sums_UE.shape == (0, 3)
