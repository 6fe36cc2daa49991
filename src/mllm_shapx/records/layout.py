"""Every path of an experiment set's directory (docs/formats.md, The output), relative to it."""

import re

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

# At least five digits; sample_000001 would be a second name of row 1.
_SAMPLE = re.compile(r"sample_([0-9]{5}|[1-9][0-9]{5,})_result\.json")
_FAILURE = re.compile(r"sample_([0-9]{5}|[1-9][0-9]{5,})\.json")
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
    match = _SAMPLE.fullmatch(name)
    return int(match[1]) if match else None


def row_of_failure(name: str) -> int | None:
    """Return the row in a failure's file name, None for any other name."""
    match = _FAILURE.fullmatch(name)
    return int(match[1]) if match else None


class RunLayout:
    """The paths of one run."""

    def __init__(self, run_name: str) -> None:
        self.run_name = run_name
        self.spec = f"{run_name}/spec.json"
        self.checkpoint = f"{run_name}/checkpoint.json"
        self.samples = f"{run_name}/samples"
        self.failures = f"{run_name}/failures"
        self.audio = f"{run_name}/audio"
        self.damaged = f"{run_name}/damaged"
        self.summary_folder = f"{run_name}/summary"
        self.summary = f"{self.summary_folder}/aggregate_metrics.json"

    def sample(self, row_index: int) -> str:
        """Return the path of a row's sample."""
        return f"{self.samples}/{sample_name(row_index)}"

    def failure(self, row_index: int) -> str:
        """Return the path of a row's failure."""
        return f"{self.failures}/{failure_name(row_index)}"

    def audio_folder(self, row_index: int) -> str:
        """Return the folder of a row's recordings and spoken answers."""
        return f"{self.audio}/sample_{row_index:05d}"


class GenerationLayout:
    """The paths of the coalition store for one row and generation key."""

    def __init__(self, row_index: int, key: str) -> None:
        stem = f"{GENERATIONS}/{row_index:05d}-{key}"
        self.answers = f"{stem}.parquet"
        self.embeddings = f"{stem}.embeddings.parquet"
        """Vectors of the answers."""
        self.likelihoods = f"{stem}.likelihoods.parquet"
        """Likelihoods of given texts."""
        self.parts = f"{stem}.parts"
        """Folder of answers flushed before the row was complete."""

    @property
    def files(self) -> tuple[str, str, str]:
        """Return the paths of the files; a row need not have all of them."""
        return self.embeddings, self.likelihoods, self.answers


def row_and_key(name: str) -> tuple[int, str] | None:
    """Return the row and the key in a name of the store's folder, None for any other name."""
    match = _GENERATION.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])
