"""Raw AliExpress and Ali-CCP files of any size, in the exact raw formats, with made-up content.

    python benchmarks/raw_files.py aliexpress --impressions 1000000 --out /tmp/raw/aliexpress
    python benchmarks/raw_files.py aliccp --impressions 1000000 --common 100000 --out /tmp/raw/ccp

Of the impressions 90% are train, the rest test; of the Ali-CCP common rows likewise. Memory does
not grow with the size. The same arguments give the same bytes. The values are noise: these files
test scale and formats, no model learns from them. A search has 20 impressions on average, numbers
have up to six decimals, an Ali-CCP impression has 10 to 14 features and a common row 45 to 89
(about 1.4 kB; the original's are several times longer). The last line is one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

CHUNK_ROWS = 50_000
TEST_SHARE = 0.1
IMPRESSIONS_PER_SEARCH = 20
CLICK_RATE, CONVERSION_RATE = 0.02, 0.0006

USER_CATEGORICALS = frozenset((*range(2, 9), 32, 33))
ITEM_CATEGORICALS = frozenset((19, 34, 35, 36, 40, 41, 42))

# field and number of values: of an impression (210 may repeat), of a common row (_14 repeat)
ITEM_FIELDS = {"205": 400_000, "206": 10_000, "207": 100_000, "216": 80_000, "301": 3}
ITEM_FIELDS |= {"508": 8_000, "509": 100_000, "702": 60_000, "853": 40_000}
ITEM_BAG = ("210", 50_000, 1, 5)
USER_FIELDS = {"101": 200_000, "121": 98, "122": 14, "124": 3, "125": 8}
USER_FIELDS |= {"126": 4, "127": 4, "128": 3, "129": 5}
USER_BAGS = (("109_14", 8_000, 8, 15), ("110_14", 300_000, 10, 25))
USER_BAGS += (("127_14", 80_000, 8, 15), ("150_14", 60_000, 10, 25))
CONVERSION_WITHOUT_CLICK_RATE = 1e-5


def chunks(total: int) -> Iterator[tuple[int, int]]:
    """Give the first row and the number of rows of each chunk."""
    for start in range(0, total, CHUNK_ROWS):
        yield start, min(CHUNK_ROWS, total - start)


def features_of_table(
    generator: np.random.Generator,
    num_rows: int,
    columns: range,
    categorical: frozenset[int],
) -> list[npt.NDArray[np.generic]]:
    """Make one array per column: integers of 5 to 60 values, or decimals between 0 and 1."""
    made: list[npt.NDArray[np.generic]] = []
    for column in columns:
        if column in categorical:
            made.append(generator.integers(0, 5 + column, num_rows))
        else:
            made.append(generator.integers(0, 1_000_000, num_rows) / 1e6)
    return made


def write_rows(writer: pacsv.CSVWriter, arrays: list[object]) -> None:
    """Append rows to a header-less CSV file."""
    names = [str(index) for index in range(len(arrays))]
    writer.write(pa.table(dict(zip(names, arrays, strict=True))))


def csv_writer(path: Path, types: list[pa.DataType]) -> pacsv.CSVWriter:
    """Open a header-less CSV file without quotes."""
    schema = pa.schema([(str(index), kind) for index, kind in enumerate(types)])
    options = pacsv.WriteOptions(include_header=False, quoting_style="none")
    return pacsv.CSVWriter(path, schema, write_options=options)


def table_types(columns: range, categorical: frozenset[int]) -> list[pa.DataType]:
    """Return the types that ``features_of_table`` makes."""
    return [pa.int64() if column in categorical else pa.float64() for column in columns]


def write_aliexpress(out: Path, country: str, split: str, impressions: int, seed: int) -> None:
    """Write ``<country>_user_<split>.csv`` and ``<country>_item_<split>.csv``."""
    generator = np.random.default_rng([seed, split == "test"])
    searches = max(impressions // IMPRESSIONS_PER_SEARCH, 1)
    base = 0 if split == "train" else 1_000_000_000
    key = generator.permutation(searches) + base
    types = [pa.int64(), *table_types(range(2, 34), USER_CATEGORICALS)]
    with csv_writer(out / f"{country}_user_{split}.csv", types) as writer:
        for start, num_rows in chunks(searches):
            made = features_of_table(generator, num_rows, range(2, 34), USER_CATEGORICALS)
            write_rows(writer, [key[start : start + num_rows], *made])
    types = [pa.int64(), *table_types(range(2, 49), ITEM_CATEGORICALS), pa.int64()]
    with csv_writer(out / f"{country}_item_{split}.csv", types) as writer:
        for start, num_rows in chunks(impressions):
            search_N = np.arange(start, start + num_rows) * searches // impressions + base
            chance_N = generator.random(num_rows)
            label_N = (chance_N < CLICK_RATE).astype(np.int64) + (chance_N < CONVERSION_RATE)
            made = features_of_table(generator, num_rows, range(2, 49), ITEM_CATEGORICALS)
            write_rows(writer, [search_N, *made, label_N])


def feature(field: str, id_N: npt.NDArray[np.int64], value: str) -> pa.Array:
    """Write one feature per row: field, id and value with their separators."""
    text = pa.array(id_N).cast(pa.string())
    return pc.binary_join_element_wise(f"{field}\x02", text, f"\x03{value}", "")


def feature_lists(
    generator: np.random.Generator,
    num_rows: int,
    fields: dict[str, int],
    bags: tuple[tuple[str, int, int, int], ...],
) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Make the number of features and the list of features of every row."""
    columns, count_N = [], np.full(num_rows, len(fields), np.int64)
    offset = 1_000
    for field, size in fields.items():
        id_N = (size * generator.random(num_rows) ** 3).astype(np.int64) + offset
        columns.append(feature(field, id_N, "1.0"))
        offset += size
    for field, size, low, high in bags:
        length_N = generator.integers(low, high + 1, num_rows)
        count_N += length_N
        for index in range(high):
            id_N = (size * generator.random(num_rows) ** 3).astype(np.int64) + offset
            made = feature(field, id_N, "2.3979")
            columns.append(pc.if_else(pa.array(index < length_N), made, pa.scalar(None)))
        offset += size
    return count_N, pc.binary_join_element_wise(*columns, "\x01", null_handling="skip")


def index_texts(number_N: npt.NDArray[np.int64]) -> pa.Array:
    """Make the 16 hexadecimal digits of each common row's index."""
    mixed = number_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return pa.array(np.char.mod("%016x", mixed))


def write_aliccp(out: Path, split: str, impressions: int, common: int, seed: int) -> None:
    """Write ``common_features_<split>.csv`` and ``sample_skeleton_<split>.csv``."""
    generator = np.random.default_rng([seed, split == "test"])
    base = 0 if split == "train" else 1_000_000_000
    types = [pa.string(), pa.int64(), pa.string()]
    with csv_writer(out / f"common_features_{split}.csv", types) as writer:
        for start, num_rows in chunks(common):
            count_N, lists = feature_lists(generator, num_rows, USER_FIELDS, USER_BAGS)
            index = index_texts(np.arange(start, start + num_rows) + base)
            write_rows(writer, [index, count_N, lists])
    types = [pa.int64(), pa.int64(), pa.int64(), pa.string(), pa.int64(), pa.string()]
    with csv_writer(out / f"sample_skeleton_{split}.csv", types) as writer:
        for start, num_rows in chunks(impressions):
            count_N, lists = feature_lists(generator, num_rows, ITEM_FIELDS, (ITEM_BAG,))
            chance_N = generator.random(num_rows)
            click_N = (chance_N < CLICK_RATE).astype(np.int64)
            orphan_N = chance_N > 1 - CONVERSION_WITHOUT_CLICK_RATE
            conversion_N = ((chance_N < CONVERSION_RATE) | orphan_N).astype(np.int64)
            index = index_texts(generator.integers(0, common, num_rows) + base)
            sample_N = np.arange(start + 1, start + num_rows + 1)
            write_rows(writer, [sample_N, click_N, conversion_N, index, count_N, lists])


def write_raw_files(
    kind: str, out: Path, *, impressions: int, common: int = 0, country: str = "nl", seed: int = 0
) -> None:
    """Write the four files of AliExpress or Ali-CCP into a directory, made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    num_test = int(impressions * TEST_SHARE)
    common_test = max(int(common * TEST_SHARE), 1)
    for split, rows, common_rows in (
        ("train", impressions - num_test, common - common_test),
        ("test", num_test, common_test),
    ):
        if kind == "aliexpress":
            write_aliexpress(out, country, split, rows, seed)
        else:
            write_aliccp(out, split, rows, max(common_rows, 1), seed)


def main() -> None:
    """Write files and print what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("aliexpress", "aliccp"))
    parser.add_argument("--impressions", type=int, required=True)
    parser.add_argument("--common", type=int, default=0, help="Ali-CCP's common-feature rows")
    parser.add_argument("--country", default="nl", choices=("nl", "fr", "us", "es", "ru"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    write_raw_files(
        arguments.kind,
        arguments.out,
        impressions=arguments.impressions,
        common=arguments.common or max(arguments.impressions // 10, 2),
        country=arguments.country,
        seed=arguments.seed,
    )
    size_bytes = sum(path.stat().st_size for path in arguments.out.iterdir())
    figures = {
        "kind": arguments.kind,
        "impressions": arguments.impressions,
        "size_bytes": size_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
