"""Checks that there is a Ray cluster at an address. Ray itself waits for minutes and gives no reason."""

import os
import threading
from pathlib import Path

from mllm_shapx.errors import ResourceError

PROBE_S = 8.0
"""Seconds that a cluster may take to answer."""
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ADVICE = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token that only you can "
    "read (or RAY_AUTH_TOKEN to the token)"
)


def probe(address: str, origin: str) -> None:
    """Check that a cluster answers at an address and accepts our token.

    Args:
        address: `host:port`, `ray://host:port` or `auto`.
        origin: Source of the address, for messages.

    Raises:
        ResourceError: If there is none, or it needs another token.
    """
    if address == "auto":
        found = _last_started()
        if found is None:
            return  # Ray searches the processes of this machine
        address, origin = found, f"auto in {origin}"
    target = address.removeprefix("ray://")
    if "://" in target or ":" not in target:
        raise ResourceError(
            f"{origin} is {address!r}, which is no address of a Ray cluster: give host:port (the port of "
            "`ray start --head`, 6379 by default), ray://host:port, auto or local"
        )
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    said = _ask(target)
    if said == "UNAUTHENTICATED":
        given = "takes another token than the one given" if _token() else "wants a token, and none is given"
        raise ResourceError(f"the Ray cluster at {address!r} (from {origin}) {given}: {_ADVICE}")
    if said == "OK" or (said == "UNIMPLEMENTED" and address.startswith("ray://")):
        return
    if said == "UNIMPLEMENTED":
        why = "what listens there is no Ray head; give the port of `ray start --head`, 6379 by default"
    else:
        why = "nothing answers there"
    raise ResourceError(
        f"there is no Ray cluster at {address!r} (from {origin}): {why}. Start one with `ray start --head`, "
        "correct --address or RAY_ADDRESS, or leave both out to run on this machine alone"
    )


def _ask(target: str) -> str:
    """Return the name of the gRPC status with which a GCS, or another server, answers."""
    said: list[str] = []

    def ask() -> None:
        import grpc

        # Ray does not use the proxies of the environment either.
        with grpc.insecure_channel(target, options=(("grpc.enable_http_proxy", 0),)) as channel:
            token = _token()
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            try:
                channel.unary_unary(_ALIVE)(b"", timeout=PROBE_S, metadata=metadata)
                said.append("OK")
            except grpc.RpcError as error:
                said.append(error.code().name)

    # In a thread, so that signals are handled during a name lookup.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_S + 1.0)
    return said[0] if said else "DEADLINE_EXCEEDED"


def _token() -> str | None:
    """Return the token that Ray would send; None without token authentication."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(path or Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None


def _last_started() -> str | None:
    """Return the address of the cluster last started on this machine, from Ray's own file."""
    note = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108 -- Ray's place
    try:
        return note.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
