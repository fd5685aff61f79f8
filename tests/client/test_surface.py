"""What the package promises by name, and what it never pulls in."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import cbp_client

_SERVER_SIDE = {"torch", "fastapi", "numba", "uvicorn", "sqlalchemy", "cbp", "cbp-server"}
_DOCS = Path(__file__).parents[2] / "docs" / "client.md"


def test_the_public_names() -> None:
    assert cbp_client.__all__ == sorted(cbp_client.__all__)
    assert set(cbp_client.__all__) == {
        "Aborted",
        "AlreadyExists",
        "AsyncClient",
        "AsyncLearner",
        "AsyncTrainingStream",
        "BatchRejected",
        "BatchResult",
        "BatchesLost",
        "CbpClientError",
        "Checkpoint",
        "CheckpointList",
        "Client",
        "ClientUnusable",
        "DeadlineExceeded",
        "EtagMismatch",
        "FailedPrecondition",
        "Fenced",
        "FieldViolation",
        "InvalidArgument",
        "LayerPlasticity",
        "Learner",
        "LearnerInfo",
        "LearnerProgress",
        "LearnerQuarantined",
        "LearnerReplaced",
        "MessageTooLarge",
        "NotFound",
        "PermissionDenied",
        "PlasticitySample",
        "Prediction",
        "ProducerPosition",
        "Quarantine",
        "RejectedBatch",
        "ResourceExhausted",
        "SequenceGap",
        "ServerError",
        "StreamClosed",
        "StreamOptions",
        "StreamPosition",
        "StreamSummary",
        "TaskRecord",
        "Ticket",
        "Trainability",
        "TrainingStream",
        "Unavailable",
        "Unimplemented",
        "WatchUpdate",
        "WatchedLearner",
    }
    for name in cbp_client.__all__:
        assert getattr(cbp_client, name).__doc__, name


def test_the_two_clients_offer_the_same() -> None:
    for synchronous, asynchronous in [
        (cbp_client.Client, cbp_client.AsyncClient),
        (cbp_client.Learner, cbp_client.AsyncLearner),
        (cbp_client.TrainingStream, cbp_client.AsyncTrainingStream),
    ]:
        offered = {name for name in vars(asynchronous) if not name.startswith("_")} - {"encode", "send_encoded"}
        assert {name for name in vars(synchronous) if not name.startswith("_")} == offered


def test_installing_pulls_nothing_of_the_server() -> None:
    assert _closure("cbp-client") & _SERVER_SIDE == set()


def test_importing_loads_nothing_of_the_server() -> None:
    heavy = _SERVER_SIDE | {"cbp_server", "pyarrow", "matplotlib", "sklearn", "scipy"}

    assert _modules("cbp_client") & (heavy | {"typer", "rich", "pydantic"}) == set()
    assert _modules("cbp_client.cli") & heavy == set()


def test_the_documentation_names_every_error() -> None:
    text = _DOCS.read_text()
    errors = [name for name in cbp_client.__all__ if isinstance(getattr(cbp_client, name), type)]
    errors = [name for name in errors if issubclass(getattr(cbp_client, name), Exception)]

    assert [name for name in errors if f"`{name}`" not in text] == []


def _modules(name: str) -> set[str]:
    """Top-level modules that are loaded after importing one."""
    code = f"import sys, {name}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.split())


def _closure(name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """The distribution and all that it requires without extras, as far as it is installed here."""
    try:
        requirements = requires(name) or []
    except PackageNotFoundError:
        return seen | {name}
    seen |= {name}
    for requirement in requirements:
        required = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if "extra ==" not in requirement and required not in seen:
            seen = _closure(required, seen)
    return seen
