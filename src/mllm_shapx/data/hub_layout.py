"""Finds a subset and split in a dataset repository: by its README's `configs`, else by its folders."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm_shapx.data.columns import listed, nearest_hint
from mllm_shapx.errors import DatasetError

DEFAULT_SUBSET = "default"

_SHARD = re.compile(r"(?P<split>[A-Za-z].*?)(?:[-_.]\d+(?:-of-\d+(?:-[0-9a-f]{16})?)?)?$")
_NUMBER = re.compile(r"(?:part-)?\d+(?:-of-\d+)?$")
_SPLIT_FOLDERS = frozenset(
    {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
)
_OF = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)(?:-[0-9a-f]{16})?\.\w+$")

Splits = dict[str, list[str]]
"""Split -> its files in name order."""


def split_files(files: Sequence[str], readme: str | None, subset: str, split: str, where: str) -> list[str]:
    """Return the parquet files of `subset` and `split` in a repository that holds `files`, in name order.

    Tried in this order: the `configs` block of the README, `SUBSET/SPLIT/*.parquet`,
    `SUBSET/SPLIT-*.parquet`, the same under `data/`; the subset `default` may lack its folder.

    Raises:
        DatasetError: Lists the existing subsets or splits; `where` names the repository.
    """
    subsets = _subsets(files, _declared_configs(readme))
    if subset not in subsets:
        if not subsets:
            raise DatasetError(
                f"{where}: holds no parquet files; set dataset.revision to a commit of its branch "
                'refs/convert/parquet, or dataset.source to "hf_datasets"'
            )
        raise DatasetError(
            f"{where}: there is no subset {subset!r}{nearest_hint(subset, subsets)}; "
            f"its subsets are {listed(sorted(subsets))}; correct dataset.subset"
        )
    splits = subsets[subset]
    if split not in splits:
        raise DatasetError(
            f"{where}: subset {subset!r} has no split {split!r}{nearest_hint(split, splits)}; "
            f"its splits are {listed(sorted(splits))}; correct dataset.split"
        )
    chosen = splits[split]
    foreign = [name for name in chosen if not name.endswith(".parquet")]
    if foreign:
        raise DatasetError(
            f'{where}: {foreign[0]} is not a parquet file; set dataset.source to "hf_datasets"'
        )
    return chosen


def local_split_files(files: Sequence[str], subset: str, split: str) -> list[str]:
    """Return the files of `subset` and `split` in a directory; empty for other layouts."""
    subsets = _folders(files)
    return subsets.get(subset, subsets.get(DEFAULT_SUBSET, {})).get(split, [])


def check_complete(files: Iterable[str], where: str) -> None:
    """Refuse an incomplete set of shards: `…-00001-of-00004` without the other three.

    Raises:
        DatasetError: Names the first missing shard.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_OF.match, files)):
        found.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in sorted(found.items()):
        absent = set(range(int(total))) - numbers
        if absent:
            shard = f"{stem}-{min(absent):0{len(total)}d}-of-{total}"
            raise DatasetError(f"{where}: the shard {shard} is missing; download the dataset again")


def _subsets(files: Sequence[str], configs: Mapping[str, Any]) -> dict[str, Splits]:
    found = _folders([name for name in files if name.endswith(".parquet")])
    for name, config in configs.items():
        splits = _declared_splits(files, config)
        if splits:
            found[name] = splits
    return found


def _folders(files: Sequence[str]) -> dict[str, Splits]:
    """Sort files into subsets and splits by their folders and names."""
    found: dict[str, Splits] = {}
    for name in sorted(files):
        subset, split = _place(name)
        found.setdefault(subset, {}).setdefault(split, []).append(name)
    return found


def _place(name: str) -> tuple[str, str]:
    """Return the subset and the split in a file's path."""
    *folders, file = name.split("/")
    if folders and folders[0] == "data":
        folders = folders[1:]
    stem = file.rpartition(".")[0]
    if folders and (_NUMBER.match(stem) or folders[-1] in _SPLIT_FOLDERS):
        split = folders.pop().removeprefix("partial-")
    else:
        match = _SHARD.match(stem)
        split = match["split"] if match else stem
    return "/".join(folders) or DEFAULT_SUBSET, split


def _declared_configs(readme: str | None) -> dict[str, Any]:
    """Return the `configs` of a README's YAML front matter by name."""
    if readme is None or not readme.startswith("---"):
        return {}
    import yaml

    try:
        front = yaml.safe_load(readme.split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}  # Use the folders; the hub itself ignores such metadata.
    configs = front.get("configs") if isinstance(front, dict) else None
    if not isinstance(configs, list):
        return {}
    return {str(item.get("config_name", DEFAULT_SUBSET)): item for item in configs if isinstance(item, dict)}


def _declared_splits(files: Sequence[str], config: Mapping[str, Any]) -> Splits:
    """Return the files of one README config: a path, paths, `{split: paths}` or `[{split, path}]`."""
    declared, folder = config.get("data_files"), str(config.get("data_dir") or "").strip("/")
    if declared is None:
        inside = [name for name in files if folder and name.startswith(f"{folder}/")]
        parquet = [name for name in inside if name.endswith(".parquet")]
        return {split: names for splits in _folders(parquet).values() for split, names in splits.items()}
    splits: Splits = {}
    for split, patterns in _patterns(declared):
        paths = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        names = sorted({name for path in paths for name in _glob(files, path)})
        if names:
            splits.setdefault(split, []).extend(names)
    return splits


def _patterns(declared: Any) -> list[tuple[str, list[str]]]:
    if isinstance(declared, dict):
        return [(str(split), _strings(paths)) for split, paths in declared.items()]
    items = declared if isinstance(declared, list) else [declared]
    if all(isinstance(item, dict) for item in items):
        return [(str(item.get("split", "train")), _strings(item.get("path"))) for item in items]
    return [("train", _strings(items))]


def _strings(value: Any) -> list[str]:
    return [str(item).removeprefix("./") for item in (value if isinstance(value, list) else [value])]


def _glob(files: Sequence[str], pattern: str) -> list[str]:
    """Return the files that match: `*` and `?` stay inside a folder, `**` crosses folders."""
    from fsspec.utils import glob_translate

    try:
        expression = re.compile(glob_translate(pattern))
    except ValueError:
        return []  # `**` beside other characters, which `datasets` refuses
    return [name for name in files if expression.match(name)]
