"""The server's settings, from flags, `CBP_…` variables and defaults. No other module reads the environment."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from cbp_server.limits import Limits

_PREFIX = "CBP_"
#: Read by the client, not by the server; both may stand in one environment.
_CLIENT_VARIABLES = {"CBP_SERVER"}

EngineSetting = Literal["auto", "compiled", "torch", "stacked"]
Port = Annotated[int, Field(ge=0, le=65535)]


def _root_path(value: str) -> str:
    if value and not re.fullmatch(r"(/[\w.~-]+)+", value, re.ASCII):
        raise ValueError("must be a path such as /cbp: begin with a slash, end without one, no query")
    return value


class Settings(BaseSettings):
    """Host continual learners behind gRPC and HTTP."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        extra="forbid",
        frozen=True,
        cli_prog_name="cbp-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    grpc_port: Port = Field(50051, description="port of the gRPC services; 0 picks a free one")
    http_port: Port = Field(8080, description="port of status page, HTTP API and metrics; 0 picks a free one")
    root_path: Annotated[str, AfterValidator(_root_path)] = Field(
        "", description="path under which a proxy serves the HTTP port, such as /cbp; empty: it has a host of its own"
    )
    data_dir: Path = Field(Path("data"), description="directory that keeps the learners; made if missing")
    store_url: str = Field(
        "", description="database of the journal, such as postgresql+psycopg://…; empty: SQLite in the data directory"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where learners train; auto takes a GPU if there is one"
    )
    engine: EngineSetting = Field(
        "auto",
        description="what executes the steps; auto: compiled code on the CPU, the stacked torch engine on a GPU",
    )
    engine_threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="threads on the CPU: compiled learners are spread over them, torch uses them in one operation",
    )
    group_wait: float = Field(
        0.0,
        ge=0,
        le=1,
        description="seconds that a batch waits for others to share a call of the stacked engine with, when it is idle",
    )
    checkpoint_url: str = Field(
        "", description="where checkpoints are kept, any fsspec URL such as s3://bucket/cbp; empty: the data directory"
    )
    checkpoint_interval: float = Field(
        30.0, gt=0, description="seconds after which a learner that has changed is saved"
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps after which it is saved, too; 0 for any number")
    checkpoint_bytes: int = Field(
        256 * 2**20, ge=0, description="bytes of journal after which it is saved, too; 0 for any number"
    )
    checkpoints_kept: int = Field(
        2, ge=1, le=1000, description="newest checkpoints kept of each learner, besides those made by request"
    )
    deleted_retention: float = Field(
        7 * 86_400.0, ge=0, description="seconds during which a deleted learner can be undeleted; 0 removes it at once"
    )
    max_live_learners: int = Field(
        1000, ge=0, description="learners in memory before idle ones are evicted to disk; 0 for any number"
    )
    evict_after: float = Field(
        3600.0, ge=0, description="seconds after which an idle learner is evicted from memory; 0 for never"
    )
    drain_timeout: float = Field(
        20.0, gt=0, description="seconds that accepted batches may take to finish after SIGTERM"
    )
    max_learners: int = Field(10_000, ge=1, description="learners that the server will host")
    max_message_bytes: int = Field(
        16 * 2**20, ge=2**10, le=2**30, description="largest batch or prediction request, in bytes"
    )
    max_parameters: int = Field(
        100_000_000, ge=1, description="weights and biases of one learner; it holds them three to six times over"
    )
    max_layers: int = Field(64, ge=1, description="hidden layers of one learner")
    max_pending_bytes: int = Field(
        64 * 2**20, ge=2**10, description="examples that may wait in one learner for a step of batch_size, in bytes"
    )
    max_activation_bytes: int = Field(
        2**30, ge=2**10, description="memory for the examples of one message or step while they are in the network"
    )
    stream_credits: int = Field(64, ge=1, le=65536, description="batches that one stream may have in flight")
    max_queued_bytes: int = Field(
        2**30, ge=2**20, description="memory of all batches that wait to be learnt; streams are not read beyond it"
    )
    history_samples: int = Field(
        500,
        ge=1,
        le=100_000,
        description="plasticity samples kept in memory per learner for history; the newest 100 are saved",
    )
    metrics_max_learners: int = Field(
        100, ge=0, description="learners with Prometheus series of their own; the others are aggregated as _others"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe events logged")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, otherwise JSON lines"
    )

    @property
    def limits(self) -> Limits:
        """What one learner and one message may claim."""
        return Limits(
            max_parameters=self.max_parameters,
            max_layers=self.max_layers,
            max_pending_bytes=self.max_pending_bytes,
            max_activation_bytes=self.max_activation_bytes,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "compiled" and self.device == "cuda":
            raise ValueError("engine compiled runs on the CPU; use --engine auto, or --device cpu")
        if self.grpc_port == self.http_port != 0:
            raise ValueError(f"grpc_port and http_port are both {self.grpc_port}; give them different ports")
        if self.data_dir.exists() and not self.data_dir.is_dir():
            raise ValueError(f"data_dir {self.data_dir} is a file; name a directory")
        return self


def load_settings(arguments: list[str] | None = None) -> Settings:
    """The settings from flags (`arguments`, default the process's own) and environment.

    Exits with status 2 and a text that names the setting and the fix if they are unknown, wrong or contradictory;
    with 0 after `--help`.
    """
    _refuse_unknown_variables()
    flags: CliSettingsSource[Settings] = CliSettingsSource(
        Settings, cli_parse_args=arguments if arguments is not None else True
    )
    try:
        return Settings(_cli_settings_source=flags)  # type: ignore[call-arg]
    except (ValidationError, SettingsError) as error:
        _fail(_explain(error))


def _refuse_unknown_variables() -> None:
    known = {f"{_PREFIX}{name.upper()}" for name in Settings.model_fields} | _CLIENT_VARIABLES
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see cbp-server --help"
            _fail(f"environment variable {name} is not a setting; {hint}")


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return str(error)
    lines = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"])
        text = detail["msg"].removeprefix("Value error, ")
        lines.append(
            f"--{name.replace('_', '-')} (or {_PREFIX}{name.upper()}): {text}, not {detail['input']!r}"
            if name
            else text
        )
    return "\n".join(lines)


def _fail(text: str) -> NoReturn:
    raise SystemExit(f"cbp-server: {text}") from None
