import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from trainables import LossSettings, TrainingSettings
from trainables.configuration import settings_of
from trainables.models import MODELS
from tuner.errors import JobFileError
from tuner.job import Budget, Job, ResourceSettings, SearchSettings, TrackingSettings, read_job
from tuner.space import Dimension

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
LEAST = "name: us\ndatasets: [data/us]\n"

NETWORK = """\
from torch import nn

class Net(nn.Module):
    num_heads = 2

    def __init__(self, inputs, *, width: int = 4):
        super().__init__()
        self.linear = nn.Linear(inputs.num_numericals, 2)

    def forward(self, ids_BF, numericals_BN):
        return self.linear(numericals_BN)

class Headless(nn.Module):
    pass

class Unannotated(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, width=4):
        super().__init__()

class WithoutDefault(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, width: int):
        super().__init__()

class Unresolved(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, width: "Width" = 4):
        super().__init__()

class Untyped(nn.Module):
    num_heads = 1

    def __init__(self, inputs, *, inner: nn.Module = nn.ReLU()):
        super().__init__()

class Positional(nn.Module):
    num_heads = 1

    def __init__(self, inputs, width):
        super().__init__()

number = 3
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Job]:
    """Read a job file of this text."""

    def read_text(text: str) -> Job:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return read_job(path)

    return read_text


@pytest.fixture
def fault(read: Callable[[str], Job], tmp_path: Path) -> Callable[[str], str]:
    """Give the message of a job file that is refused: one line that begins with its path."""

    def refuse(text: str) -> str:
        with pytest.raises(JobFileError) as caught:
            read(text)
        message = str(caught.value)
        start = f"{tmp_path / 'job.yaml'}: "
        assert message.startswith(start)
        assert "\n" not in message
        return message.removeprefix(start)

    return refuse


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name a module of the user's own, on the path."""
    name = f"networks_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_job_needs_no_more_than_a_name_and_datasets(read: Callable[[str], Job]) -> None:
    job = read(LEAST)
    assert job.model_dump() == {
        "name": "us",
        "datasets": ("data/us",),
        "models": ("mmoe",),
        "search": {
            "space": {
                "loss.alpha": dimension(low=0.001, high=1.0, log=True, points=4),
                "loss.m1": dimension(low=0.0, high=0.5, points=4),
                "loss.m2": dimension(low=0.0, high=0.5, points=4),
            },
            "sampler": "tpe",
            "pruner": "asha",
            "trials": 40,
            "replicates": 5,
            "objective": "mean_auc",
            "seed": 0,
        },
        "training": {
            "epochs": 2,
            "batch_size": 2048,
            "learning_rate": 1e-3,
            "weight_decay": 1e-6,
            "precision": "auto",
            "evaluate_every": 1.0,
            "folding": "auto",
            "cuda_graph": "auto",
            "compile": False,
            "embedding_optimizer": "auto",
            "seed": 0,
        },
        "model": {},
        "loss": {"alpha": 0.3, "m1": 0.3, "m2": 0.1, "gate": "hinge"},
        "resources": {
            "lanes": None,
            "workers_per_lane": 1,
            "cpus_per_worker": None,
            "gpus_per_worker": None,
            "autoscaled": False,
        },
        "data": {"mode": "auto", "buffer_mib": 512},
        "budget": {"hours": None, "trial_hours": None, "hang_minutes": 30.0},
        "tracking": {"uri": None},
        "storage": "pwiser",
        "keep_checkpoints": "winners",
    }


def dimension(**given: object) -> dict[str, object]:
    return {"low": None, "high": None, "log": False, "points": None, "values": None} | given


def test_every_key_can_be_set(read: Callable[[str], Job]) -> None:
    content = {
        "name": "us.v2_a-b",
        "datasets": ["data/us", "s3://bucket/fr"],
        "models": ["ple", "dnn"],
        "search": {
            "space": {"loss.alpha": {"values": [0.1, 0.2]}},
            "sampler": "random",
            "pruner": "none",
            "trials": 7,
            "objective": ["ctr_auc", "ctcvr_auc"],
            "seed": 3,
        },
        "training": {
            "epochs": 3,
            "batch_size": 64,
            "learning_rate": 0.01,
            "weight_decay": 0.0,
            "precision": "float32",
            "evaluate_every": 0.25,
            "seed": 4,
        },
        "model": {"embedding_dim": 8},
        "loss": {"alpha": 0.5, "m1": 0.1, "m2": 0.2, "gate": "literal"},
        "resources": {
            "lanes": 2,
            "workers_per_lane": 3,
            "cpus_per_worker": 4,
            "gpus_per_worker": 2.0,
            "autoscaled": True,
        },
        "budget": {"hours": 1.5},
        "tracking": {"uri": "http://mlflow:5000"},
        "storage": "s3://bucket/pwiser",
        "keep_checkpoints": "all",
    }
    job = read(yaml.safe_dump(content))
    assert job.search.objectives == ("ctr_auc", "ctcvr_auc")
    set_values = job.model_dump(mode="json", exclude_unset=True)
    assert set_values == content


def test_one_objective_is_a_list_of_one(read: Callable[[str], Job]) -> None:
    assert read(LEAST).search.objectives == ("mean_auc",)
    assert read(LEAST + "search: {objective: [ctr_auc]}").search.objectives == ("ctr_auc",)


def test_numbers_without_a_point_are_read_as_people_write_them(read: Callable[[str], Job]) -> None:
    job = read(LEAST + "training: {learning_rate: 1e-3}\nbudget: {hours: 8}\n")
    assert (job.training.learning_rate, job.budget.hours) == (1e-3, 8.0)


@pytest.mark.parametrize(
    ("text", "path", "known"),
    [
        ("sampler: tpe", "sampler", Job),
        ("search: {smapler: tpe}", "search.smapler", SearchSettings),
        ("training: {lr: 0.1}", "training.lr", TrainingSettings),
        ("loss: {alfa: 0.1}", "loss.alfa", LossSettings),
        ("resources: {gpus: 1}", "resources.gpus", ResourceSettings),
        ("budget: {minutes: 1}", "budget.minutes", Budget),
        ("tracking: {url: x}", "tracking.url", TrackingSettings),
        ("search: {space: {loss.m1: {lo: 0, high: 1}}}", "search.space.loss.m1.lo", Dimension),
    ],
)
def test_unknown_keys_are_refused_and_the_known_ones_listed(
    fault: Callable[[str], str], text: str, path: str, known: type
) -> None:
    fields = ", ".join(known.model_fields)
    assert fault(LEAST + text) == f"{path}: unknown key; the known ones are {fields}"


MODEL_KEYS = (
    "batch_norm, ctcvr, dropout, embedding_dim, expert_units, gate_units, num_experts, "
    "numericals, tower_units"
)
MODEL_NAMES = "choose from shared_bottom, mmoe, ple, dnn, masknet, or name your own as module:Class"
A_NAME = "must be letters, digits, '.', '_' or '-', a letter or digit first"
A_MAPPING = "must be a mapping of keys to values (leave it out for the defaults)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [esmm]", f"models: 'esmm' is no model; {MODEL_NAMES}"),
        ("models: [':Net']", f"models: ':Net' is no model; {MODEL_NAMES}"),
        ("models: ['math:']", f"models: 'math:' is no model; {MODEL_NAMES}"),
        ("models: []", "models: must not be empty, got []"),
        (
            "resources: {gpus_per_worker: 1.5}",
            "resources: gpus_per_worker 1.5 must be a whole number, or below 1",
        ),
        (
            "resources: {gpus_per_worker: 0.5, workers_per_lane: 2}",
            "resources: gpus_per_worker 0.5 puts several workers of a lane on one GPU, where they "
            "cannot train together; give each a whole one, or set workers_per_lane to 1",
        ),
        ("models: [ple, ple]", "models: 'ple' is named twice; names must differ"),
        ("models: ple", "models: must be a list, got 'ple'"),
        (
            "search: {sampler: cmaes}",
            "search.sampler: must be one of 'tpe', 'random', 'grid' or 'gp', got 'cmaes'",
        ),
        (
            "search: {pruner: hyperband}",
            "search.pruner: must be one of 'asha', 'median' or 'none', got 'hyperband'",
        ),
        (
            "search: {objective: auc}",
            "search.objective: must be one of mean_auc, ctr_auc, ctcvr_auc, or a list, got 'auc'",
        ),
        (
            "search: {objective: [ctr_auc, auc]}",
            "search.objective: must be one of mean_auc, ctr_auc, ctcvr_auc, or a list, got 'auc'",
        ),
        (
            "search: {objective: [[ctr_auc]]}",
            "search.objective: must be one of mean_auc, ctr_auc, ctcvr_auc, or a list, "
            "got ['ctr_auc']",
        ),
        (
            "search: {objective: []}",
            "search: objective must name at least one metric, and each once, got []",
        ),
        (
            "search: {objective: [ctr_auc, ctr_auc], pruner: none}",
            "search: objective must name at least one metric, and each once, "
            "got ['ctr_auc', 'ctr_auc']",
        ),
        (
            "search: {objective: [ctr_auc, ctcvr_auc]}",
            "search: pruner asha compares one objective; set pruner: none for a Pareto study",
        ),
        (
            "search: {replicates: 1}",
            "search.replicates: must be 0 or at least 2, since one seed shows no spread, got 1",
        ),
        ("search: {trials: 0}", "search.trials: must be at least 1, got 0"),
        ("search: {trials: 1.5}", "search.trials: must be a whole number, got 1.5"),
        ("search: {trials: many}", "search.trials: must be a whole number, got 'many'"),
        ("search: {seed: -1}", "search.seed: must be at least 0, got -1"),
        ("search: {space: {}}", "search.space: must not be empty, got {}"),
        ("search:", f"search: {A_MAPPING}, got None"),
        ("training: [1]", f"training: {A_MAPPING}, got [1]"),
        ("training: {batch_size: 0}", "training.batch_size: must be at least 1, got 0"),
        ("training: {learning_rate: 0}", "training.learning_rate: must be above 0, got 0"),
        ("training: {evaluate_every: 2}", "training.evaluate_every: must be at most 1, got 2"),
        (
            "training: {precision: fp16}",
            "training.precision: must be one of 'auto', 'float32' or 'bfloat16', got 'fp16'",
        ),
        ("loss: {alpha: -1}", "loss.alpha: must be at least 0, got -1"),
        ("loss: {alpha: .inf}", "loss.alpha: must be a finite number, got inf"),
        ("loss: {m1: wide}", "loss.m1: must be a number, got 'wide'"),
        ("loss: {gate: soft}", "loss.gate: must be one of 'hinge' or 'literal', got 'soft'"),
        ("resources: {lanes: 0}", "resources.lanes: must be at least 1, got 0"),
        ("budget: {hours: 0}", "budget.hours: must be above 0, got 0"),
        ("storage: 3", "storage: must be text, got 3"),
        (
            "keep_checkpoints: best",
            "keep_checkpoints: must be one of 'winners' or 'all', got 'best'",
        ),
        ("model: 3", "model: must be a mapping of keys to values, got 3"),
        ("model: {width: 3}", f"model.width: unknown key; those of mmoe are {MODEL_KEYS}"),
        ("model: {num_experts: few}", "model.num_experts: must be a whole number, got 'few'"),
        ("model: {num_experts: 0}", "model: mmoe: num_experts must be at least 1, got 0"),
        ("model: {expert_units: 5}", "model.expert_units: must be a list, got 5"),
        ("model: {batch_norm: 5}", "model.batch_norm: must be true or false, got 5"),
        ("3: x", "3: keys should be strings, got 3"),
        (
            "search: {trials: 0, seed: -1}",
            "search.trials: must be at least 1, got 0; search.seed: must be at least 0, got -1",
        ),
    ],
)
def test_a_fault_is_told_by_field_value_and_fix(
    fault: Callable[[str], str], text: str, message: str
) -> None:
    assert fault(LEAST + text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [d]", "name: missing; add it"),
        ("name: a", "datasets: missing; add it"),
        ("name: ''\ndatasets: [d]", f"name: {A_NAME}, got ''"),
        ("name: a/b\ndatasets: [d]", f"name: {A_NAME}, got 'a/b'"),
        ("name: -a\ndatasets: [d]", f"name: {A_NAME}, got '-a'"),
        ("name: 3\ndatasets: [d]", "name: must be text, got 3"),
        (
            f"name: {'a' * 101}\ndatasets: [d]",
            f"name: must have at most 100 characters, got '{'a' * 101}'",
        ),
        ("name: a\ndatasets: []", "datasets: must not be empty, got []"),
        ("name: a\ndatasets: d", "datasets: must be a list, got 'd'"),
        ("name: a\ndatasets: ['']", "datasets: '' names nothing; leave it out"),
        ("name: a\ndatasets: [/]", "datasets: '/' names nothing; leave it out"),
        ("name: a\ndatasets: [x/d, y/d/]", "datasets: 'd' is named twice; names must differ"),
        ("- name", "not a job file; it needs at least name and datasets"),
        ("", "not a job file; it needs at least name and datasets"),
        (
            "name: a\nname: b\n",
            "line 2, column 1: not YAML (key 'name' is there twice); mend that line",
        ),
        (
            "name: a\ndatasets: [d]\nsearch: {seed: 1, trials: 2, seed: 3}\n",
            "line 3, column 30: not YAML (key 'seed' is there twice); mend that line",
        ),
        (
            "name: a\ndatasets: [d\nmodels: [x]\n",
            "line 3, column 7: not YAML (expected ',' or ']', but got ':'); mend that line",
        ),
        (
            "name: a\n\tdatasets: [d]\n",
            "line 2, column 1: not YAML (found character '\\t' that cannot start any token); "
            "mend that line",
        ),
        (
            "name: 2024-02-30\n",
            "line 1, column 7: not YAML ('2024-02-30' is no timestamp that can be read; "
            "text stands in quotes); mend that line",
        ),
        (
            f"name: {'9' * 5_000}\n",
            f"line 1, column 7: not YAML ('{'9' * 40}' is no int that can be read; "
            "text stands in quotes); mend that line",
        ),
        ("[" * 2_000, "not YAML (it is nested too deeply); mend that line"),
        ("? [a]\n: b\n", "line 1, column 3: not YAML (found unhashable key); mend that line"),
        (
            "name: !!python/name:os.system\n",
            "line 1, column 7: not YAML (could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'); mend that line",
        ),
    ],
)
def test_what_is_no_job_is_refused(fault: Callable[[str], str], text: str, message: str) -> None:
    assert fault(text) == message


def test_a_missing_file_a_directory_and_binary_content_are_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(JobFileError) as caught:
            read_job(path)
        assert str(caught.value) == f"{path}: cannot be read ({reason}); name a job file"
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(JobFileError, match=r"model\.bin: cannot be read \(not UTF-8 text\)"):
        read_job(tmp_path / "model.bin")


@pytest.mark.parametrize("secret", ["open-sesame", "open/sesame+", ""])
@pytest.mark.parametrize(
    ("line", "field", "host"),
    [
        ("tracking: {{uri: 'http://admin:{secret}@mlflow:5000'}}", "tracking.uri", "mlflow:5000"),
        ("storage: 's3://KEY:{secret}@bucket/jobs'", "storage", "bucket/jobs"),
        (
            "tracking: {{uri: 'postgresql://db:5432/mlflow?user=u&password={secret}'}}",
            "tracking.uri",
            "db:5432/mlflow?user=u",
        ),
        ("storage: 'abfs://box/jobs?sas_token={secret}@'", "storage", "box/jobs"),
    ],
)
def test_a_password_is_refused_and_not_shown(
    fault: Callable[[str], str], line: str, field: str, host: str, secret: str
) -> None:
    assert fault(LEAST + line.format(secret=secret)) == (
        f"{field}: a password stands in the URI of {host}, and job files are kept and shown; "
        "give it in the environment (MLFLOW_TRACKING_URI or _PASSWORD, AWS_SECRET_ACCESS_KEY)"
    )


def test_a_password_in_a_datasets_uri_is_refused(fault: Callable[[str], str]) -> None:
    assert fault("name: us\ndatasets: [data/es, 's3://KEY:open-sesame@bucket/us']\n") == (
        "datasets: a password stands in the URI of bucket/us, and job files are kept and shown; "
        "give it in the environment (MLFLOW_TRACKING_URI or _PASSWORD, AWS_SECRET_ACCESS_KEY)"
    )


def test_a_user_or_a_port_is_no_password(read: Callable[[str], Job]) -> None:
    job = read(
        "name: us\ndatasets: ['s3://KEY@bucket/us', 's3://bucket/10:30/es']\n"
        "tracking: {uri: 'http://admin@mlflow:5000'}\nstorage: 'hdfs://name:9000/jobs'\n"
    )
    assert job.tracking.uri == "http://admin@mlflow:5000"
    assert job.storage == "hdfs://name:9000/jobs"


def test_model_settings_go_to_the_models_that_have_them(read: Callable[[str], Job]) -> None:
    job = read(LEAST + "models: [mmoe, dnn]\nmodel: {num_experts: 3, hidden_units: [7]}\n")
    mmoe, dnn = (job.configuration(model).model_settings for model in job.models)
    assert mmoe["num_experts"] == 3
    assert "hidden_units" not in mmoe
    assert dnn["hidden_units"] == (7,)
    assert "num_experts" not in dnn
    assert mmoe["expert_units"] == (512, 256, 128)


def test_a_setting_that_no_model_has_lists_those_of_all(fault: Callable[[str], str]) -> None:
    assert fault(LEAST + "models: [mmoe, dnn]\nmodel: {width: 3}\n") == (
        "model.width: unknown key; those of mmoe, dnn are batch_norm, ctcvr, dropout, "
        "embedding_dim, expert_units, gate_units, hidden_units, num_experts, numericals, "
        "tower_units"
    )


def test_the_json_schema_takes_jobs_and_refuses_others() -> None:
    schema = Job.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    job = {"name": "a", "datasets": ["d"], "search": {"space": {"loss.alpha": {"low": 0.1}}}}
    jsonschema.validate(job, schema)
    for wrong, where in (
        ({"sampler": "tpe"}, "Additional properties"),
        ({"search": {"sampler": "cmaes"}}, "is not one of"),
        ({"search": {"objective": "auc"}}, "is not one of"),
        ({"name": "a b"}, "does not match"),
        ({"budget": {"hours": 0}}, "less than or equal to the minimum"),
        ({"model": {"num_experts": "many"}}, "is not of type 'integer'"),
        ({"model": {"variant": "diagonal"}}, "is not one of"),
    ):
        with pytest.raises(jsonschema.ValidationError, match=where):
            jsonschema.validate(job | wrong, schema)
    with pytest.raises(jsonschema.ValidationError, match="'datasets' is a required property"):
        jsonschema.validate({"name": "a"}, schema)


def test_the_json_schema_has_the_settings_of_every_model_and_leaves_room_for_others() -> None:
    schema = Job.model_json_schema()
    known = schema["properties"]["model"]["properties"]
    assert set(known) == {name for model in MODELS for name in settings_of(model).model_fields}
    assert known["embedding_dim"]["description"] == (
        "default 128 (shared_bottom, mmoe, ple), 40 (dnn, masknet)"
    )
    job = {"name": "a", "datasets": ["d"], "models": ["my_model:Mine"], "model": {"width": 3}}
    jsonschema.validate(job, schema)


def test_a_job_cannot_be_changed(read: Callable[[str], Job]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(LEAST).name = "b"


def test_a_model_of_the_users_own_is_found(read: Callable[[str], Job], networks: str) -> None:
    job = read(LEAST + f"models: [mmoe, '{networks}:Net']\nmodel: {{width: 6}}\n")
    configuration = job.configuration(f"{networks}:Net")
    assert configuration.model_settings == {"width": 6}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nut", "module '{module}' has no 'Nut'; name a class of its"),
        ("number", " is no torch.nn.Module; name a class of one"),
        (
            "Headless",
            " has no class attribute num_heads; set it to the number of logits, "
            "2 (click, conversion) or 1 (click), see trainables/contract.py",
        ),
    ],
)
def test_a_model_of_another_form_is_refused(
    fault: Callable[[str], str], networks: str, name: str, message: str
) -> None:
    told = fault(LEAST + f"models: ['{networks}:{name}']")
    colon = ": " if message.startswith("module") else ""
    assert told == f"models: '{networks}:{name}'{colon}{message.format(module=networks)}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unannotated", "models: argument 'width' of '{}' needs an annotation and a default"),
        ("WithoutDefault", "models: argument 'width' of '{}' needs an annotation and a default"),
        (
            "Unresolved",
            "models: an annotation of '{}' cannot be resolved (name 'Width' is not defined); "
            "import it at run time",
        ),
        ("Positional", "model: {}: Positional.__init__() missing 1 required positional argument"),
    ],
)
def test_a_constructor_that_no_job_file_can_call_is_refused(
    fault: Callable[[str], str], networks: str, name: str, message: str
) -> None:
    told = fault(LEAST + f"models: ['{networks}:{name}']")
    assert told.startswith(message.format(f"{networks}:{name}"))


def test_a_setting_that_yaml_cannot_hold_is_refused(
    fault: Callable[[str], str], networks: str
) -> None:
    told = fault(LEAST + f"models: ['{networks}:Untyped']")
    assert told.startswith(f"models: the arguments of '{networks}:Untyped' cannot be settings (")
    assert told.endswith("; use names and types that YAML can hold")


def test_a_module_that_is_not_there_or_broken_is_told(
    fault: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fault(LEAST + "models: ['no_such_networks:Net']") == (
        "models: 'no_such_networks:Net' cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_networks'); mend it, or put the directory of 'no_such_networks' on PYTHONPATH"
    )
    (tmp_path / "broken_networks.py").write_text("raise OSError('two\\nlines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fault(LEAST + "models: ['broken_networks:Net']").startswith(
        "models: 'broken_networks:Net' cannot be imported (OSError: two lines); mend it, or"
    )


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if "schema" not in path.name], ids=lambda path: path.stem
)
def test_the_examples_are_job_files(path: Path) -> None:
    assert read_job(path).name == path.stem


@pytest.mark.parametrize("model", ["shared_bottom", "mmoe", "ple", "dnn", "masknet"])
def test_a_job_is_read_without_the_compiler_of_torch(model: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"{LEAST}models: [{model}]\n")
    reads = "import sys; from pathlib import Path; from tuner.job import read_job; "
    reads += "read_job(Path(sys.argv[1])); sys.exit('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", reads, str(tmp_path / "job.yaml")]
    assert subprocess.run(command, check=False).returncode == 0
