"""Every path of an experiment set's directory (docs/formats.md, The output), relative to it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

GENERATIONS = "generations"
LOCK = ".lock"
PACE = "pace.json"
PROGRESS = "progress.json"
SHARDS = "shards"

RESERVED = {
    GENERATIONS: "the store's folder",
    PACE: "the file of measured costs",
    PROGRESS: "the file of the last progress",
    SHARDS: "the folder of shards",
    "config.json": "the config's copy",
    "report.html": "the report's file",
    "wandb": "the folder of Weights & Biases",
    "mlflow": "the folder of MLflow",
    "spec.json": "a file by which a run's directory is known",
    "checkpoint.json": "a file by which a run's directory is known",
    "samples": "a folder by which a run's directory is known",
}
"""Reserved names -> their meaning. A run with such a name would be mistaken for it."""

_LONGEST_NAME = 200
"""Most characters of a run's name: file systems allow 255 bytes, and other tools add a prefix or a suffix."""

_SAMPLE = re.compile(r"sample_(\d{5,})_result\.json")
_FAILURE = re.compile(r"sample_(\d{5,})\.json")
_GENERATION = re.compile(
    r"(\d{5,})-([0-9A-Za-z_]+)(\.parquet|\.embeddings\.parquet|\.likelihoods\.parquet|\.parts)"
)


def name_fault(run_name: str) -> str | None:
    """Return why a run name is invalid, None when it is valid. Ignores case, as some file systems do."""
    if run_name.startswith("."):
        return f'"{run_name}" begins with a dot, and hidden folders are not looked for'
    if run_name.startswith("set_aside_"):
        return f'"{run_name}" begins like the folders of results that were set aside'
    taken = RESERVED.get(run_name.casefold())
    if taken is not None:
        return f'"{run_name}" is the name of {taken}'
    if len(run_name) > _LONGEST_NAME:
        return f"the run's name is {len(run_name)} characters long, and at most {_LONGEST_NAME} are taken"
    return None


def sample_name(row_index: int) -> str:
    """Return the file name of a row's sample."""
    return f"sample_{row_index:05d}_result.json"


def failure_name(row_index: int) -> str:
    """Return the file name of a row's failure."""
    return f"sample_{row_index:05d}.json"


def row_of_sample(name: str) -> int | None:
    """Return the row in a sample's file name, None for any other name."""
    return _row(_SAMPLE, name, sample_name)


def row_of_failure(name: str) -> int | None:
    """Return the row in a failure's file name, None for any other name."""
    return _row(_FAILURE, name, failure_name)


def _row(pattern: re.Pattern[str], name: str, canonical: Callable[[int], str]) -> int | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    row = int(match[1])
    # sample_000001 would be a second name of row 1.
    return row if canonical(row) == name else None


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The paths of one run."""

    run_name: str

    @property
    def spec(self) -> str:
        """Return the path of the resolved config."""
        return f"{self.run_name}/spec.json"

    @property
    def checkpoint(self) -> str:
        """Return the path of the checkpoint."""
        return f"{self.run_name}/checkpoint.json"

    @property
    def summary(self) -> str:
        """Return the path of the aggregate metrics."""
        return f"{self.run_name}/summary/aggregate_metrics.json"

    @property
    def summary_folder(self) -> str:
        """Return the folder of summaries."""
        return f"{self.run_name}/summary"

    @property
    def samples(self) -> str:
        """Return the folder of samples."""
        return f"{self.run_name}/samples"

    @property
    def failures(self) -> str:
        """Return the folder of failures."""
        return f"{self.run_name}/failures"

    @property
    def audio(self) -> str:
        """Return the folder of all rows' recordings."""
        return f"{self.run_name}/audio"

    @property
    def damaged(self) -> str:
        """Return the folder of damaged files."""
        return f"{self.run_name}/damaged"

    def sample(self, row_index: int) -> str:
        """Return the path of a row's sample."""
        return f"{self.run_name}/samples/{sample_name(row_index)}"

    def failure(self, row_index: int) -> str:
        """Return the path of a row's failure."""
        return f"{self.run_name}/failures/{failure_name(row_index)}"

    def audio_folder(self, row_index: int) -> str:
        """Return the folder of a row's recordings and spoken answers."""
        return f"{self.run_name}/audio/sample_{row_index:05d}"


@dataclass(frozen=True, slots=True)
class GenerationLayout:
    """The paths of the coalition store for one row and generation key."""

    row_index: int
    key: str

    @property
    def stem(self) -> str:
        """Return the common prefix of the files' names."""
        return f"{self.row_index:05d}-{self.key}"

    @property
    def answers(self) -> str:
        """Return the path of the answers."""
        return f"{GENERATIONS}/{self.stem}.parquet"

    @property
    def embeddings(self) -> str:
        """Return the path of the answers' vectors."""
        return f"{GENERATIONS}/{self.stem}.embeddings.parquet"

    @property
    def likelihoods(self) -> str:
        """Return the path of the likelihoods of given texts."""
        return f"{GENERATIONS}/{self.stem}.likelihoods.parquet"

    @property
    def parts(self) -> str:
        """Return the folder of answers flushed before the row was complete."""
        return f"{GENERATIONS}/{self.stem}.parts"

    @classmethod
    def of_name(cls, name: str) -> "GenerationLayout | None":
        """Return the row and key in a name of the store's folder, None for any other name."""
        match = _GENERATION.fullmatch(name)
        return None if match is None else cls(int(match[1]), match[2])
