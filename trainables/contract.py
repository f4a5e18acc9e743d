"""The contract that every architecture meets, as tests to inherit.

For an architecture of your own, in any test file that pytest collects:

    from trainables.contract import ModelContract

    class TestMyModel(ModelContract):
        model = MyModel
        settings = {"num_layers": 2}

Shape suffixes: B batch, F columns of ids, N numericals, T heads.
"""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainables.loss import binary_cross_entropy
from trainables.models import Inputs

_INPUTS = Inputs(vocabulary_sizes=(7, 30, 3), num_numericals=4)
_NUM_ROWS = 16


class ModelContract:
    """What training, search and export take for granted about a model; see `trainables.models`.

    Attributes:
        model: the architecture.
        settings: its settings for these tests; the others keep their defaults.
    """

    model: ClassVar[type[nn.Module]]
    settings: ClassVar[dict[str, Any]] = {}

    def build(self, inputs: Inputs = _INPUTS, *, seed: int = 0) -> nn.Module:
        """Build the model with fresh weights from ``seed``."""
        torch.manual_seed(seed)
        return self.model(inputs, **self.settings)

    def logits(self, model: nn.Module, ids_BF: Tensor, numericals_BN: Tensor) -> Tensor:
        """Return the model's logits_BT in eval mode, without gradients."""
        with torch.no_grad():
            logits_BT: Tensor = model.eval()(ids_BF, numericals_BN)
        return logits_BT

    def num_heads(self) -> int:
        """Return T as the class declares it."""
        return int(getattr(self.model, "num_heads", 0))

    def test_settings_are_annotated_keywords_with_defaults(self) -> None:
        """A job file's schema is derived from the signature, so it must say everything."""
        parameters = list(inspect.signature(self.model, eval_str=True).parameters.values())
        assert parameters, "__init__ must take the inputs first"
        assert parameters[0].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD, (
            "__init__ must take the inputs first, as a positional parameter"
        )
        for parameter in parameters[1:]:
            assert parameter.kind == inspect.Parameter.KEYWORD_ONLY, f"{parameter} is no keyword"
            assert parameter.annotation is not parameter.empty, f"{parameter} has no annotation"
            assert parameter.default is not parameter.empty, f"{parameter} has no default"

    def test_num_heads_is_declared(self) -> None:
        """Class attribute num_heads: 1 for clicks alone, 2 for clicks and conversions."""
        assert self.num_heads() in {1, 2}, "set the class attribute num_heads to 1 or 2"

    def test_logits_have_a_row_per_impression_and_a_column_per_head(self) -> None:
        """logits_BT of float32, finite."""
        self._check_logits(self.logits(self.build(), *_features(_INPUTS)))

    def test_batch_of_one(self) -> None:
        """One impression alone gets its logits."""
        ids_BF, numericals_BN = _features(_INPUTS, num_rows=1)
        self._check_logits(self.logits(self.build(), ids_BF, numericals_BN), num_rows=1)

    def test_works_without_numericals(self) -> None:
        """Categorical fields alone, with numericals of width 0."""
        inputs = Inputs(vocabulary_sizes=(5, 9), num_numericals=0)
        self._check_learning_signal(inputs)

    def test_works_without_categoricals(self) -> None:
        """Numericals alone, with ids of width 0."""
        inputs = Inputs(vocabulary_sizes=(), num_numericals=3)
        self._check_learning_signal(inputs)

    def test_a_bag_is_the_mean_of_its_ids(self) -> None:
        """A field of several ids per impression: neither order nor padding (-1) matters."""
        inputs = Inputs(vocabulary_sizes=(7, 30), num_numericals=4, bag_lengths=(1, 3))
        self._check_learning_signal(inputs)
        model = self.build(inputs)
        bags = torch.tensor([[5, 2, -1], [2, 5, -1], [5, 9, 2], [8, -1, -1], [8, 8, 8]])
        ids_BF = torch.cat([torch.ones(5, 1, dtype=torch.int64), bags], 1)
        logits_BT = self.logits(model, ids_BF, torch.ones(5, 4))
        for one, other in ((0, 1), (3, 4)):
            torch.testing.assert_close(logits_BT[one], logits_BT[other], rtol=1e-4, atol=1e-5)
        assert not torch.equal(logits_BT[0], logits_BT[2]), "the third id changes nothing"

    def test_gradients_reach_every_parameter(self) -> None:
        """A parameter without gradient would stop data-parallel training."""
        self._check_learning_signal(_INPUTS)

    def test_any_integer_type_of_ids(self) -> None:
        """Ids come as narrow as their vocabularies allow."""
        model = self.build()
        ids_BF, numericals_BN = _features(_INPUTS)
        expected_BT = self.logits(model, ids_BF, numericals_BN)
        for dtype in (torch.int8, torch.int16, torch.int32):
            actual_BT = self.logits(model, ids_BF.to(dtype), numericals_BN)
            assert torch.equal(actual_BT, expected_BT), f"ids of {dtype} give other logits"

    def test_unknown_ids_and_extreme_ids(self) -> None:
        """Id 0 (unknown) and each vocabulary's last id have finite logits."""
        sizes_F = torch.tensor(_INPUTS.vocabulary_sizes)
        ids_BF = torch.stack([torch.zeros_like(sizes_F), sizes_F - 1])
        numericals_BN = torch.zeros(2, _INPUTS.num_numericals)
        self._check_logits(self.logits(self.build(), ids_BF, numericals_BN), num_rows=2)

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """In eval mode an impression's logits are its own, whatever else is in the batch."""
        model = self.build()
        ids_BF, numericals_BN = _features(_INPUTS)
        together_BT = self.logits(model, ids_BF, numericals_BN)
        for row in (0, _NUM_ROWS - 1):
            alone = self.logits(model, ids_BF[row : row + 1], numericals_BN[row : row + 1])
            torch.testing.assert_close(alone[0], together_BT[row], rtol=1e-4, atol=1e-5)

    def test_same_seed_same_logits(self) -> None:
        """Weights come from torch's global generator and from nothing else."""
        features = _features(_INPUTS)
        first_BT = self.logits(self.build(seed=3), *features)
        assert torch.equal(first_BT, self.logits(self.build(seed=3), *features))
        assert not torch.equal(first_BT, self.logits(self.build(seed=4), *features))

    def test_state_dict_holds_the_whole_model(self) -> None:
        """A checkpoint loaded into a model of another seed, or of no memory yet, is the model."""
        features = _features(_INPUTS)
        trained = self.build(seed=1)
        trained.train()(*features)  # moves running statistics, where there are any
        expected_BT = self.logits(trained, *features)

        other = self.build(seed=2)
        other.load_state_dict(trained.state_dict())
        assert torch.equal(self.logits(other, *features), expected_BT)

        with torch.device("meta"):
            empty = self.build()
        assert all(parameter.is_meta for parameter in empty.parameters()), "not built on meta"
        empty.load_state_dict(trained.state_dict(), assign=True)
        assert torch.equal(self.logits(empty, *features), expected_BT)

    def test_bfloat16_autocast(self) -> None:
        """Under autocast the logits are finite and near the float32 ones."""
        model = self.build()
        features = _features(_INPUTS)
        exact_BT = self.logits(model, *features)
        with torch.autocast("cpu", torch.bfloat16):
            rough_BT = self.logits(model, *features)
        torch.testing.assert_close(rough_BT.float(), exact_BT, rtol=0.1, atol=0.1)

    def test_learns(self) -> None:
        """Adam lowers the loss on a planted problem."""
        model = self.build().train()
        ids_BF, numericals_BN = _features(_INPUTS, num_rows=256)
        clicks_B = (ids_BF[:, 0] >= 3) | (numericals_BN[:, 0] > 1.0)
        conversions_B = clicks_B & (ids_BF[:, 1] >= 15)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        losses = []
        for _ in range(50):
            loss = binary_cross_entropy(model(ids_BF, numericals_BN), clicks_B, conversions_B)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], f"loss {losses[0]:.3f} only fell to {losses[-1]:.3f}"

    def _check_logits(self, logits_BT: Tensor, num_rows: int = _NUM_ROWS) -> None:
        expected = (num_rows, self.num_heads())
        assert tuple(logits_BT.shape) == expected, f"logits are {tuple(logits_BT.shape)}"
        assert logits_BT.dtype == torch.float32, f"logits are {logits_BT.dtype}"
        assert bool(logits_BT.isfinite().all()), "logits are not finite"

    def _check_learning_signal(self, inputs: Inputs) -> None:
        model = self.build(inputs).train()
        logits_BT = model(*_features(inputs))
        self._check_logits(logits_BT)
        logits_BT.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert bool(parameter.grad.isfinite().all()), f"{name} gets no finite gradient"


def _features(inputs: Inputs, num_rows: int = _NUM_ROWS) -> tuple[Tensor, Tensor]:
    """Random ids and numericals, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randint(size, (num_rows, length), generator=generator)
        for size, length in zip(inputs.vocabulary_sizes, inputs.bag_lengths, strict=True)
    ]
    ids_BF = torch.cat(columns, 1) if columns else torch.empty(num_rows, 0, dtype=torch.int64)
    return ids_BF, torch.randn(num_rows, inputs.num_numericals, generator=generator)
