"""``pwiser data``: make prepared datasets and look at them."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.complaint import complain
from tuner.cli.options import local_path
from tuner.cli.progress import shown_progress

if TYPE_CHECKING:
    from datasets import ConversionPolicy, Dataset, Manifest

__all__ = ["data_app"]

data_app = typer.Typer(
    no_args_is_help=True,
    help="Make prepared datasets and look at them.",
    epilog="Example: pwiser data stats data/demo",
)
prepare_app = typer.Typer(
    no_args_is_help=True,
    help="Make a prepared dataset from input tables.",
    epilog="Example: pwiser data prepare table --input rows.csv --schema rows.schema.yaml "
    "--out data/rows",
)
data_app.add_typer(prepare_app, name="prepare")


class PresetName(StrEnum):
    """The presets of ``datasets.PRESETS`` (a test holds the two together)."""

    DEMO = "demo"
    FR = "fr"
    NL = "nl"
    US = "us"
    CCP = "ccp"


class OrphanChoice(StrEnum):
    """The choices of ``datasets.CONVERSION_POLICIES`` (a test holds the two together)."""

    REFUSE = "refuse"
    DROP = "drop"
    AS_CLICK = "as-click"

    @property
    def policy(self) -> "ConversionPolicy":
        """The choice as the library writes it."""
        policies: dict[OrphanChoice, ConversionPolicy] = {
            OrphanChoice.REFUSE: "refuse",
            OrphanChoice.DROP: "drop",
            OrphanChoice.AS_CLICK: "as-click",
        }
        return policies[self]


Out = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Directory or URI to make; must not exist.")
]


class Country(StrEnum):
    """The countries of ``datasets.COUNTRIES`` (a test holds the two together)."""

    NL = "nl"
    FR = "fr"
    US = "us"
    ES = "es"
    RU = "ru"


class NumericalChoice(StrEnum):
    """The numerical types of ``datasets.schema`` (a test holds the two together)."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


ValidFraction = Annotated[
    float, typer.Option(help="Share of train's groups (sessions) that become valid.")
]
SplitSeed = Annotated[int, typer.Option(help="Another seed carves other groups.")]
ConversionWithoutClick = Annotated[
    OrphanChoice,
    typer.Option(
        "--conversion-without-click",
        help="Rows that convert without a click: refuse the table, drop them, or count a click.",
    ),
]


@data_app.command(
    "synth", epilog="Example: pwiser data synth --out data/demo --preset demo --impressions 200000"
)
def synth(
    *,
    out: Out,
    impressions: Annotated[int, typer.Option(help="Rows of all splits together.", min=1)],
    preset: Annotated[
        PresetName, typer.Option(help="demo, or a public dataset whose rates are taken.")
    ] = PresetName.DEMO,
    seed: Annotated[int, typer.Option(help="Another seed gives other rows.", min=0)] = 0,
    accidental_clicks: Annotated[
        float,
        typer.Option(
            help="Share of all clicks that are accidents; the CTR grows by 1 / (1 - share).",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0,
) -> None:
    """Make a synthetic dataset of the impression, click, conversion funnel."""
    from datasets import synthesize

    with shown_progress() as report:
        manifest = synthesize(
            out=out,
            impressions=impressions,
            preset=preset.value,
            seed=seed,
            accidental_clicks=accidental_clicks,
            report=report,
        )
    _print_summary(out, manifest)


@prepare_app.command(
    "table",
    epilog="Example: pwiser data prepare table --input rows.csv --schema rows.schema.yaml "
    "--out data/rows",
)
def prepare_table(
    *,
    input: Annotated[  # noqa: A002  (the option's name)
        str,
        typer.Option(
            "--input",
            metavar="PATH",
            help="CSV or Parquet rows of train: a file, a directory of files, 'dir/*.csv'.",
        ),
    ],
    schema: Annotated[
        Path,
        typer.Option(
            "--schema", metavar="SCHEMA.yaml", help="The roles of the columns.", parser=local_path
        ),
    ],
    out: Out,
    valid: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows of valid; carved from train if not given."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows of test; carved from train if not given."),
    ] = None,
    conversion_without_click: ConversionWithoutClick = OrphanChoice.REFUSE,
    on_ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Read the files by Ray tasks, over the cluster in RAY_ADDRESS; its nodes need "
            "the files and this package.",
        ),
    ] = False,
) -> None:
    """Prepare any CSV or Parquet table with a schema file of your own."""
    import datasets

    with ExitStack() as stack:
        map_sources = datasets.map_sources_here
        if on_ray:
            from tuner.cluster import connected
            from tuner.preparation_tasks import map_sources_on_cluster

            stack.enter_context(connected())
            map_sources = map_sources_on_cluster
        report = stack.enter_context(shown_progress())
        manifest = datasets.prepare_table(
            input=input,
            schema=schema,
            out=out,
            valid=valid,
            test=test,
            conversion_without_click=conversion_without_click.policy,
            map_sources=map_sources,
            report=report,
        )
    _print_summary(out, manifest)


@prepare_app.command(
    "aliexpress",
    epilog="Example: pwiser data prepare aliexpress --input AliExpress_NL --out data/aliexpress-nl",
)
def prepare_aliexpress(
    *,
    input: Annotated[  # noqa: A002  (the option's name)
        str,
        typer.Option(
            "--input",
            metavar="DIR",
            help="Holds train.csv and test.csv, processed; with --raw the country's four files.",
        ),
    ],
    out: Out,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Read Tianchi's user and item files (csv, gz, zst, zip)."),
    ] = False,
    country: Annotated[
        Country | None, typer.Option(help="Whose raw files to read; with --raw.")
    ] = None,
    valid_fraction: ValidFraction = 0.1,
    split_seed: SplitSeed = 0,
    numerical_type: Annotated[
        NumericalChoice,
        typer.Option(help="Of the loaded numericals; float16 halves their memory."),
    ] = NumericalChoice.FLOAT32,
    conversion_without_click: ConversionWithoutClick = OrphanChoice.REFUSE,
) -> None:
    """Prepare the AliExpress search logs, processed or raw."""
    import datasets

    if raw != (country is not None):
        raise datasets.TableError(
            "--raw and --country: give both for the raw files (--raw --country nl), or neither for "
            "train.csv and test.csv in the processed form"
        )
    with shown_progress() as report:
        if country is not None:
            manifest = datasets.prepare_aliexpress_raw(
                input=local_path(input),
                country=country.value,
                out=out,
                valid_fraction=valid_fraction,
                split_seed=split_seed,
                numerical_type=numerical_type.value,
                report=report,
            )
        else:
            manifest = datasets.prepare_aliexpress(
                input=input,
                out=out,
                valid_fraction=valid_fraction,
                split_seed=split_seed,
                numerical_type=numerical_type.value,
                conversion_without_click=conversion_without_click.policy,
                report=report,
            )
    _print_summary(out, manifest)


@prepare_app.command(
    "aliccp", epilog="Example: pwiser data prepare aliccp --input Ali-CCP --out data/aliccp"
)
def prepare_aliccp(
    *,
    input: Annotated[  # noqa: A002  (the option's name)
        Path,
        typer.Option(
            "--input",
            metavar="DIR",
            help="Holds sample_skeleton and common_features of train and test (csv, gz, zst, zip).",
            parser=local_path,
        ),
    ],
    out: Out,
    valid_fraction: ValidFraction = 0.1,
    split_seed: SplitSeed = 0,
    min_count: Annotated[int, typer.Option(help="Ids rarer than this in train are unknown.")] = 10,
    bag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=LENGTH",
            help="Keep up to so many values of a field and average their vectors, as in "
            "--bag 210=5; again for more fields, 'all' for every multi-valued one.",
        ),
    ] = None,
    conversion_without_click: ConversionWithoutClick = OrphanChoice.DROP,
) -> None:
    """Prepare the raw Ali-CCP logs; multi-valued fields keep their first value, or are bags."""
    import datasets

    with shown_progress() as report:
        manifest = datasets.prepare_aliccp(
            input=input,
            out=out,
            valid_fraction=valid_fraction,
            split_seed=split_seed,
            min_count=min_count,
            bags=_read_bags(bag or []),
            conversion_without_click=conversion_without_click.policy,
            report=report,
        )
    _print_summary(out, manifest)


def _read_bags(texts: list[str]) -> dict[str, int]:
    """Read the lengths of bags by field; what is given for a field itself goes before 'all'."""
    from datasets import TableError
    from datasets.sources.aliccp_features import MULTI_VALUED

    bags: dict[str, int] = {}
    for text in texts:
        field, _, length = text.partition("=")
        if not length.isdecimal():
            raise TableError(f"--bag {text}: no FIELD=LENGTH; give a field and a number, as 210=5")
        if field in bags:
            raise TableError(f"--bag {text}: {field} is given twice; give it once")
        bags[field] = int(length)
    every = bags.pop("all", None)
    return bags if every is None else dict.fromkeys(MULTI_VALUED, every) | bags


@data_app.command("validate", epilog="Example: pwiser data validate data/demo")
def validate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A prepared dataset.")],
) -> None:
    """Check a prepared dataset against its manifest: files, labels, ids, counts, digest."""
    import datasets

    dataset = datasets.open_dataset(directory)
    with shown_progress() as report:
        faults = datasets.validate(dataset, report=report)
    if faults:
        for fault in faults:
            complain(f"{directory}: {fault}")
        noun = "fault" if len(faults) == 1 else "faults"
        raise datasets.DatasetError(f"{directory}: {len(faults)} {noun}; prepare the dataset again")
    typer.echo(f"valid {directory}: digest {dataset.digest[:12]}")


@data_app.command("stats", epilog="Example: pwiser data stats data/demo --json")
def stats(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A prepared dataset.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print impressions, clicks, conversions, CTR, CVR and CTCVR of each split and of all."""
    from datasets import open_dataset, statistics, total

    dataset = open_dataset(directory)
    if as_json:
        splits = {name: asdict(split) for name, split in statistics(dataset).items()}
        content = {
            "dataset": dataset.name,
            "digest": dataset.digest,
            "splits": splits,
            "all": asdict(total(dataset)),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    _print_table(dataset)


def _print_table(dataset: "Dataset") -> None:
    from rich.console import Console
    from rich.table import Table

    from datasets import statistics, total

    table = Table(title=f"{dataset.name}  (digest {dataset.digest[:12]})")
    table.add_column("split")
    for heading in ("impressions", "clicks", "conversions", "CTR", "CVR", "CTCVR"):
        table.add_column(heading, justify="right")
    for name, split in (*statistics(dataset).items(), ("all", total(dataset))):
        counts = (f"{n:,}" for n in (split.impressions, split.clicks, split.conversions))
        ratios = ("-" if r is None else f"{r:.3%}" for r in (split.ctr, split.cvr, split.ctcvr))
        table.add_row(name, *counts, *ratios)
    Console().print(table)


def _print_summary(out: str, manifest: "Manifest") -> None:
    rows = ", ".join(f"{name} {split.impressions:,}" for name, split in manifest.splits.items())
    lines = [f"prepared {out}: {rows} rows; digest {manifest.digest[:12]}"]
    if manifest.dropped_rows:
        lines.append(f"dropped {manifest.dropped_rows:,} rows with a conversion without a click")
    if manifest.added_clicks:
        lines.append(f"added {manifest.added_clicks:,} clicks to conversions without one")
    lines += [f"counted {count:,} {what}" for what, count in manifest.counted.items()]
    if manifest.filled_cells:
        cells, fields = sum(manifest.filled_cells.values()), len(manifest.filled_cells)
        lines.append(f"filled {cells:,} empty, NaN or infinite cells in {fields} fields")
    typer.echo("\n".join(lines))
