"""Compare every causal family of the installed transformers with `generate` at batch 1; print a table.

Each model is small, with random weights and windows shorter than the prompts. All coalitions of two rows are
answered in batches and compared with `model.generate` for each alone, greedily in float32. Takes about ten
minutes on two cores: `python scripts/check_families.py [MODEL_TYPE ...]`.
"""

import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm_shapx.errors import ShapxError
from mllm_shapx.models.decoder_choice import Decoder
from mllm_shapx.models.generation_settings import read_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

LARGEST = 3_000_000
"""Maximum parameters of a small model; larger ones take too long on a CPU."""


class NoTokenizer:
    """A tokenizer without further stop tokens."""

    pad_token_id = eos_token_id = eos_token = None


def check(model_type: str, class_name: str) -> tuple[str, str]:
    """Return (outcome, details) of one family."""
    from families import CHANGES, build, compare

    try:
        config, model_class = CONFIG_MAPPING[model_type], getattr(transformers, class_name)
        model = build(config, model_class, CHANGES.get(model_type), largest=LARGEST)
    except Exception as error:  # noqa: BLE001 -- families refuse small sizes in many ways
        return "not built", f"{type(error).__name__}: {first_line(error)}"
    try:
        found = compare(copy.deepcopy(model), Decoder(model, read_settings(model, NoTokenizer())))
    except ShapxError as error:
        return "refused", first_line(error)
    except Exception as error:  # noqa: BLE001 -- the table shows it
        return "FAILED", f"{type(error).__name__}: {first_line(error)}"
    outcome = "equal" if found.equal == found.total else "DIFFERENT"
    return outcome, f"{found.equal} of {found.total}, {found.distinct} distinct, {found.way}"


def first_line(error: Any) -> str:
    """Return the beginning of an error's text."""
    return next(iter(str(error).splitlines()), "")[:100]


def main() -> None:
    """Print a line per family and the counts of the outcomes."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    asked = sys.argv[1:]
    counts: dict[str, int] = {}
    started = time.monotonic()
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if asked and model_type not in asked:
            continue
        outcome, behind = check(model_type, names if isinstance(names, str) else names[0])
        counts[outcome] = counts.get(outcome, 0) + 1
        print(f"{model_type:28} {outcome:10} {behind}", flush=True)
    print(
        f"\n{sum(counts.values())} families in {time.monotonic() - started:.0f} s: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    )
    if counts.get("DIFFERENT") or counts.get("FAILED"):
        sys.exit(1)


if __name__ == "__main__":
    main()
