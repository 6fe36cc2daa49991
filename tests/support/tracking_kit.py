"""Samples and loopback servers for tests of trackers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mllm_shapx.records.results import AttributionSummary, ConversationEntry, SampleResult


def make_sample(run_name: str, row_index: int, *, grand: float = 1.0) -> SampleResult:
    """Return a sample of two words; the first has the larger value."""
    entry = ConversationEntry(0, (0, 0), ("red", " <car>"), (0.75, -0.25))
    return SampleResult(
        run_name=run_name,
        row_index=row_index,
        language="en",
        original_language="unknown",
        runtime_sec=0.5,
        n_calls=4,
        model_calls=3,
        prompt_texts=("red <car>",),
        input_modality="text",
        output_modality="text",
        attr_summary=AttributionSummary(1.0, 0.0, 1.0, 0.0, 2, 0),
        conversation=((entry,),),
        base_value=0.25,
        grand_value=grand,
        response="stop",
        seed=1,
        num_players=2,
        values_sum=0.5,
    )


@contextmanager
def silent_server() -> Iterator[int]:
    """Yield the port of a server on loopback that accepts connections and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for connection in held:
        connection.close()
