"""Random edits of files: of JSON's and CSV's structure, of parquet's types, of any file's bytes."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**9,
    10**30,
    1.5,
    -0.0,
    1e308,
    -1e300,
    "",
    " ",
    "text",
    "nan",
    "mc",
    "samples",
    ".hidden",
    "spec.json",
    "../up",
    "~",
    "~nobody-there/x",
    "a\0b",
    "\ud800",
    "\x1b[31mred\x1b[0m",
    "\u202eright to left",
    "https://user:password@host/x",
    "s3://bucket/x",
    "file:///tmp/x",
    "x" * 5000,
    "word " * 3000,
    [],
    {},
    [[]],
    [None],
    [1, "a", None],
    {"a": 1},
    [1e308] * 4,
]
RAW_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-0", "01", "0x10"]
WORDS = [
    b"",
    b"\0",
    b"\xff",
    b"\xc3",
    b'"',
    b"'",
    b"\n",
    b"\r",
    b",",
    b"[",
    b"]" * 50,
    b"[" * 3000,
    b"\x1b[2J",
]
CELLS = [
    "",
    "nan",
    "NaN",
    '"nan"',
    "1",
    "1e400",
    "9" * 400,
    "true",
    "2020-01-01",
    '"',
    '""',
    '"open',
    "['a', 'b']",
    '"[""a"", null]"',
    "['a'",
    "x" * 3000,
    "word " * 2000,
    "\x1b[31m",
    "tab\there",
    "\ud800",
    "\u202eabc",
    "(" * 500,
    "[" * 500 + "]" * 500,
]


def edit_json(path: Path, draw: random.Random) -> str:
    """Change one to three places of a JSON file; return a description."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError):
        return edit_bytes(path, draw)
    done = []
    for _ in range(draw.randrange(1, 4)):
        found = _places(data)
        if not found:
            break
        container, key = draw.choice(found)
        done.append(_edit_place(data, container, key, draw))
    text = json.dumps(data)
    if draw.random() < 0.1:
        raw = draw.choice(RAW_NUMBERS)
        text = text.replace(draw.choice(["0", "1", "true", "null"]), raw, 1)
        done.append(f"raw {raw[:10]}")
    if draw.random() < 0.03:
        depth = draw.choice([20, 40, 100, 900, 5000])
        text = text.replace("null", "[" * depth + "]" * depth, 1).replace(
            "{", '{"deep": ' + "[" * depth + "]" * depth + ", ", 1
        )
        done.append(f"deep {depth}")
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return "; ".join(done)


def _places(data: Any) -> list[tuple[Any, Any]]:
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    found = [(data, key) for key in keys]
    return found + [place for key in keys for place in _places(data[key])]


def _edit_place(data: Any, container: Any, key: Any, draw: random.Random) -> str:
    action = draw.randrange(6)
    if action <= 1:
        container[key] = copy.deepcopy(draw.choice(JUNK))
        return f"{key}={str(container[key])[:30]!r}"
    if action == 2:
        del container[key]
        return f"without {key}"
    if action == 3:
        other, there = draw.choice(_places(data))
        container[key] = copy.deepcopy(other[there])
        return f"{key} from {there}"
    if action == 4 and isinstance(container, dict):
        container[draw.choice([f"{key}s", "", "a", "\ud800", "\x1b[1m", "base"])] = container.pop(key)
        return f"{key} renamed"
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        container[key] = [value, value]
        return f"{key} twice"
    container[key] = value * draw.choice([-1, 0.5, 2, 1000, 10**12])
    return f"{key}={container[key]}"


def edit_csv(path: Path, draw: random.Random) -> str:
    """Change cells, rows or the header of a CSV file; return a description."""
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    done = []
    for _ in range(draw.randrange(1, 4)):
        row = draw.choice(rows)
        place = draw.randrange(len(row)) if row else 0
        action = draw.randrange(5)
        if action <= 2 and row:
            row[place] = draw.choice(CELLS)
            done.append(f"cell {row[place][:20]!r}")
        elif action == 3:
            row.insert(place, draw.choice(CELLS))
            done.append("a cell more")
        else:
            rows[0][draw.randrange(len(rows[0]))] = draw.choice([*rows[0], "prompt", "", "\x1b[1m"])
            done.append("header")
    end = draw.choice(["\n", "\n", "\r\n", "\r"])
    path.write_bytes(end.join(",".join(row) for row in rows).encode("utf-8", "surrogatepass"))
    return "; ".join(done)


def edit_parquet(path: Path, draw: random.Random) -> str:
    """Give a column another type, values or name; return a description."""
    table = pq.read_table(path)
    name = draw.choice(table.column_names)
    kind = draw.choice(list(_ODD))
    try:
        column = _ODD[kind](table.num_rows, draw)
        place = table.column_names.index(name)
        if draw.random() < 0.15:
            table = table.append_column(draw.choice([name, "", "\x1b[1m"]), column)
        else:
            table = table.set_column(place, name, column)
        pq.write_table(table, path, row_group_size=draw.choice([1, 2, 1000]))
    except (pa.ArrowException, NotImplementedError, TypeError, ValueError, OverflowError):
        return edit_bytes(path, draw)
    return f"{name} as {kind}"


def _strings(rows: int, _draw: random.Random) -> pa.Array:
    return pa.array(["some words here"] * rows)


def _invalid(rows: int, _draw: random.Random) -> pa.Array:
    data = b"\xff\xfe words" * rows
    size = len(data) // rows
    offsets = b"".join((size * place).to_bytes(4, "little") for place in range(rows + 1))
    return pa.Array.from_buffers(pa.string(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


_ODD: dict[str, Callable[[int, random.Random], Any]] = {
    "invalid UTF-8": _invalid,
    "float with NaN": lambda rows, _: pa.array([float("nan")] * rows),
    "text nan": lambda rows, _: pa.array(["nan", "NaN", None, ""] * rows)[:rows],
    "null": lambda rows, _: pa.nulls(rows),
    "bool": lambda rows, _: pa.array([True] * rows),
    "uint64": lambda rows, _: pa.array([2**64 - 1] * rows, pa.uint64()),
    "half": lambda rows, _: pa.array([1.5] * rows).cast(pa.float16()),
    "decimal": lambda rows, _: pa.array(["1.25"] * rows).cast(pa.decimal128(10, 2)),
    "decimal256": lambda rows, _: pa.array(["1.25"] * rows).cast(pa.decimal256(50, 2)),
    "binary": lambda rows, _: pa.array([b"\xff\0"] * rows),
    "fixed binary": lambda rows, _: pa.array([b"ab"] * rows, pa.binary(2)),
    "large string": lambda rows, draw: _strings(rows, draw).cast(pa.large_string()),
    "string view": lambda rows, draw: _strings(rows, draw).cast(pa.string_view()),
    "dictionary": lambda rows, draw: _strings(rows, draw).dictionary_encode(),
    "timestamp": lambda rows, _: pa.array([2**62] * rows, pa.int64()).cast(pa.timestamp("s")),
    "timestamp ns": lambda rows, _: pa.array([1] * rows, pa.int64()).cast(pa.timestamp("ns", "No/Where")),
    "date": lambda rows, _: pa.array([2**30] * rows, pa.int32()).cast(pa.date32()),
    "time": lambda rows, _: pa.array([1] * rows, pa.int64()).cast(pa.time64("ns")),
    "duration": lambda rows, _: pa.array([2**62] * rows, pa.int64()).cast(pa.duration("ns")),
    "list": lambda rows, _: pa.array([["one", None, "two words"]] * rows),
    "list of numbers": lambda rows, _: pa.array([[1, 2]] * rows),
    "fixed list": lambda rows, _: pa.array([["a", "b"]] * rows, pa.list_(pa.string(), 2)),
    "large list": lambda rows, _: pa.array([["a"]] * rows, pa.large_list(pa.string())),
    "nested list": lambda rows, _: pa.array([[["a"]]] * rows),
    "struct": lambda rows, _: pa.array([{"bytes": 10**10, "path": "a\0b"}] * rows),
    "map": lambda rows, _: pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
    "long text": lambda rows, _: pa.array(["word " * 20_000] * rows),
    "escapes": lambda rows, _: pa.array(["\x1b]0;title\x07 \x1b[31mred words"] * rows),
    "words of control": lambda rows, _: pa.array(["\0 \x01 \u2028 \u202e end"] * rows),
}
"""Possible Arrow types and values of a column of text or numbers."""


def edit_bytes(path: Path, draw: random.Random) -> str:
    """Change bytes of any file; return a description."""
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    place = draw.randrange(len(data) + 1)
    action = draw.randrange(7)
    if action == 0:
        del data[place:]
        done = f"cut at {place}"
    elif action == 1:
        del data[:place]
        done = f"from {place}"
    elif action == 2:
        done = "bytes flipped"
        for _ in range(draw.choice([1, 1, 8, 64])):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif action == 3:
        word = draw.choice(WORDS)
        data[place:place] = word
        done = f"{word[:10]!r} at {place}"
    elif action == 4:
        data = data * 2
        done = "twice"
    elif action == 5:
        data[place : place + 64] = draw.randbytes(64)
        done = f"64 random bytes at {place}"
    else:
        encoding = draw.choice(["utf-16", "utf-32", "cp037"])
        data = bytearray(data.decode("latin-1").encode(encoding))
        done = f"as {encoding}"
    path.write_bytes(data)
    return done


def edit_place(path: Path, draw: random.Random) -> str:
    """Replace a file or folder by something else; return a description."""
    action = draw.choice(["gone", "folder", "loop", "dangling", "empty", "device", "pipe"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if action == "folder":
        path.mkdir()
    elif action == "loop":
        path.symlink_to(path.name)
    elif action == "dangling":
        path.symlink_to("nowhere")
    elif action == "empty":
        path.touch()
    elif action == "device":
        path.symlink_to("/dev/zero")
    elif action == "pipe":
        os.mkfifo(path)
    return action
