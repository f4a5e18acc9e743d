"""The rules by which a trial is computed."""

import subprocess
import sys

import pytest
import torch
from planted import CPU, INPUTS, make_split

from trainables import (
    ConfigurationError,
    DeviceImpressions,
    TrainingSettings,
    TrialConfiguration,
    Workers,
)
from trainables.execution import compute_dtype
from trainables.metrics import evaluate
from trainables.training import predict_logits, train

SETTINGS = {"embedding_dim": 8, "expert_units": (12, 8), "num_experts": 3, "gate_units": ()}
WORKERS = Workers(device=CPU)


def trained(folding: str, split: DeviceImpressions) -> torch.nn.Module:
    training = TrainingSettings.model_validate(
        {"batch_size": 64, "precision": "float32", "folding": folding, "epochs": 1}
    )
    configuration = TrialConfiguration.create("mmoe", SETTINGS, training=training)
    ((_, model),) = train(configuration, INPUTS, split, split, WORKERS)
    return model


def test_training_folded_and_plain_ends_at_the_same_weights() -> None:
    split = make_split(320)
    folded, plain = (trained(folding, split).state_dict() for folding in ("on", "off"))
    assert folded.keys() == plain.keys()
    for key, value in folded.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4, msg=key)


def test_folded_model_gives_the_metrics_of_its_plain_copy() -> None:
    split = make_split(5_000)
    folded = trained("on", split)
    plain = trained("off", split)
    plain.load_state_dict(folded.state_dict())
    logits = [predict_logits(model, split, WORKERS) for model in (folded, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    one, other = (evaluate(found, split.clicks_N, split.conversions_N) for found in logits)
    for name, value in one.items():  # rounding may swap a few pairs
        assert value == pytest.approx(other[name], abs=2e-5), name


def test_unknown_folding_is_refused() -> None:
    configuration = TrialConfiguration.create("mmoe", SETTINGS)
    with pytest.raises(ConfigurationError, match=r"training\.folding: .*'auto', 'on' or 'off'"):
        configuration.replace({"training.folding": "sometimes"})


def test_precision_is_taken_by_the_word() -> None:
    device = torch.device("cpu")
    assert compute_dtype("float32", device) == torch.float32
    assert compute_dtype("bfloat16", device) == torch.bfloat16
    assert compute_dtype("auto", device) in {torch.float32, torch.bfloat16}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_kept_memory_is_not_faulted_in_again() -> None:
    script = """
import resource, torch
from trainables.execution import keep_freed_memory
assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):  # until the heap has settled
    torch.ones(16_000_000)
before = faults()
for _ in range(3):
    torch.ones(16_000_000)  # 64 MB, 16,000 pages
print(faults() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1_000
