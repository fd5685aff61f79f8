"""The server's settings, from flags, `CBP_…` variables and defaults. No other module reads the environment."""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cbp_server.limits import Limits

_PREFIX = "CBP_"
#: Read by the client and by the experiments, not by the server; all may stand in one environment.
_OTHER_VARIABLES = {"CBP_SERVER", "CBP_MNIST"}
#: Kubernetes tells every pod of every service in its namespace, in variables that begin with the service's name: those
#: of `cbp` or `cbp-metrics` look like settings.
_LINK_NAME = re.compile(r"CBP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)")
_LINKED_PORT, _LINK_VALUE = re.compile(r"CBP_(\w+_)?PORT"), re.compile(r"(tcp|udp|sctp)://")
#: From 0 to 1: a variable whose name is as like a setting's as this is a misspelt one.
_NEAR_MISS = 0.8

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

    host: str = Field(
        "127.0.0.1", description="address to listen on, or a name: all its addresses; :: for every interface"
    )
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
    max_producers: int = Field(
        1000, ge=1, le=10_000, description="producers of one learner; beyond it those that have been away are forgotten"
    )
    producer_retention: float = Field(
        300.0, ge=0, description="seconds for which a producer that was cut off is kept when its place is needed"
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)  # which may hold CBP_GRPC_PORT=tcp://…, a service's
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if not _is_service_link(name, value or "")
        }
        return super().settings_customise_sources(
            settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
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
    _refuse_misspelt_variables()
    flags: CliSettingsSource[Settings] = CliSettingsSource(
        Settings, cli_parse_args=arguments if arguments is not None else True
    )
    try:
        return Settings(_cli_settings_source=flags)  # type: ignore[call-arg]
    except (ValidationError, SettingsError) as error:
        _fail(_explain(error))


@dataclass(frozen=True)
class IgnoredVariable:
    """A `CBP_…` variable that somebody may have meant as a setting, and that does not count."""

    name: str
    reason: str


def ignored_variables() -> list[IgnoredVariable]:
    """For the log; those that Kubernetes sets for services are left out, unless a setting has their name."""
    known, ignored = _known_variables(), []
    for name, value in _own_variables():
        if _is_service_link(name, value):
            if name.upper() in known:
                reason = (
                    f"its value {value} is what Kubernetes sets for a service of that name; use the flag, or "
                    "enableServiceLinks: false in the pod"
                )
                ignored.append(IgnoredVariable(name, reason))
        elif name.upper() not in known:
            ignored.append(IgnoredVariable(name, f"it is not a setting; {_hint(name, known)}"))
    return ignored


def _refuse_misspelt_variables() -> None:
    known = _known_variables()
    for name, value in _own_variables():
        if name.upper() not in known and not _is_service_link(name, value) and _nearest(name, known, _NEAR_MISS):
            _fail(f"environment variable {name} is not a setting; {_hint(name, known)}")


def _known_variables() -> set[str]:
    return {f"{_PREFIX}{name.upper()}" for name in Settings.model_fields} | _OTHER_VARIABLES


def _own_variables() -> list[tuple[str, str]]:
    return sorted(item for item in os.environ.items() if item[0].upper().startswith(_PREFIX))


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set the variable for a service."""
    name = name.upper()
    linked_port = _LINKED_PORT.fullmatch(name) and _LINK_VALUE.match(value)
    return bool(linked_port or _LINK_NAME.fullmatch(name))


def _nearest(name: str, known: set[str], least_alike: float) -> str:
    """The known variable that is most like this one; empty if none is much like it."""
    unprefixed = {variable.removeprefix(_PREFIX): variable for variable in known}
    close = difflib.get_close_matches(name.upper().removeprefix(_PREFIX), unprefixed, n=1, cutoff=least_alike)
    return unprefixed[close[0]] if close else ""


def _hint(name: str, known: set[str]) -> str:
    nearest = _nearest(name, known, 0.5)
    return f"did you mean {nearest}?" if nearest else "see cbp-server --help"


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
