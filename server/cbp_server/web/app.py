"""The FastAPI application. It only reads: learners are created and trained over gRPC."""

from collections import Counter
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline

from cbp_server.loop.turns import Turns
from cbp_server.metrics.exposition import Exposition, TextFormat
from cbp_server.records.learners import LearnerState
from cbp_server.records.read_model import ReadModel, all_shown, one_shown
from cbp_server.web import schemas
from cbp_server.web.head_requests import HeadRequests
from cbp_server.web.problems import PROBLEM_CONTENT, install_problem_handlers
from cbp_server.web.root_path import RootPath
from cbp_server.web.security_headers import SecurityHeaders

_STATIC = Path(__file__).parent / "static"

#: Quarantined learners that are named in the view of the server.
_MOST_NAMED = 100

_DESCRIPTION = """
Reads the state of a cbp server. Learners are created, trained and asked for predictions over gRPC;
keys and errors here are those of its messages. Errors are problem details (RFC 9457).
"""

_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {**PROBLEM_CONTENT, "description": "There is no such learner."}}
_UNREADY: dict[int | str, dict[str, Any]] = {503: {"model": schemas.Health, "description": "Not ready; says why."}}
_INVALID: dict[int | str, dict[str, Any]] = {
    400: {**PROBLEM_CONTENT, "description": "A page token that this server did not give out."},
    422: {**PROBLEM_CONTENT, "description": "A parameter that is not what it should be."},
}


def create_app(service: ReadModel, exposition: Exposition, *, root_path: str = "") -> FastAPI:
    """The application that shows `service` and its metrics.

    Args:
        root_path: path under which a proxy serves it, whether or not the proxy takes it off what it passes on.
    """
    server_version, torch_version = version("cbp-server"), version("torch")
    start_time = datetime.now(UTC)

    # FastAPI's own /docs loads Swagger UI from a content delivery network; this one brings it along.
    app = FastAPIOffline(
        title="cbp server",
        version=server_version,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        static_url="/static/swagger-ui",
        openapi_tags=[{"name": "learners"}, {"name": "server"}],
    )
    app.add_middleware(SecurityHeaders)
    app.add_middleware(HeadRequests)
    if root_path:
        app.add_middleware(RootPath, root_path=root_path)
    install_problem_handlers(app)

    @app.get("/v1/learners", tags=["learners"], summary="List learners", responses=_INVALID)
    async def list_learners(
        page_size: Annotated[
            int, Query(ge=0, description="At most this many; 0 means 50, more than 1000 is treated as 1000.")
        ] = 0,
        page_token: Annotated[str, Query(description="next_page_token of the page before.")] = "",
        show_deleted: Annotated[bool, Query(description="Also those that are deleted and can be undeleted.")] = False,
    ) -> schemas.LearnerPage:
        """In the order of their ids, each with its newest plasticity sample."""
        learners, next_page_token = service.page(page_size, page_token, deleted=show_deleted)
        return schemas.LearnerPage(
            learners=all_shown(service, learners, schemas.Learner.of), next_page_token=next_page_token
        )

    @app.get("/v1/learners/{learner_id}", tags=["learners"], summary="Get a learner", responses=_NOT_FOUND)
    async def get_learner(learner_id: str) -> schemas.Learner:
        """One learner with its newest plasticity sample."""
        return one_shown(service, service.learner(learner_id), schemas.Learner.of)

    @app.get(
        "/v1/learners/{learner_id}/plasticity",
        tags=["learners"],
        summary="Get a learner's plasticity, now and before",
        responses={**_NOT_FOUND, 422: _INVALID[422]},
    )
    async def get_plasticity(
        learner_id: str,
        max_samples: Annotated[int, Query(ge=0, description="At most this many of the newest; 0 means 1.")] = 0,
    ) -> schemas.PlasticityHistory:
        """The newest samples, oldest first. A sample is taken every `monitoring.interval` steps."""
        samples, turns = [], Turns()
        for sample in service.samples(learner_id, max_samples or 1):
            samples.append(schemas.PlasticitySample.of(sample))
            if turns.over:  # of many layers, hundreds of samples take seconds
                await turns.give_way()
        return schemas.PlasticityHistory(samples=samples)

    @app.get("/v1/server", tags=["server"], summary="Get the server")
    async def get_server() -> schemas.Server:
        """Versions, engine, totals, and whether it is ready."""
        everything = service.learners(deleted=True)
        learners = [record for record in everything if record.state is not LearnerState.DELETED]
        quarantined = [record.learner_id for record in learners if record.quarantine is not None]
        engine, journal = service.engine_status(), service.journal_status()
        reasons = list(service.readiness())
        states = Counter(record.state for record in everything)
        steps = all_shown(service, learners, lambda record: index(record.progress.step))
        examples = all_shown(service, learners, lambda record: index(record.progress.examples))
        return schemas.Server(
            version=server_version,
            torch_version=torch_version,
            start_time=start_time,
            time=datetime.now(UTC),
            ready=not reasons,
            reasons=reasons,
            engine=schemas.Engine(
                up=engine.up,
                device=engine.device,
                restarts=engine.restarts,
                steps=engine.steps,
                train_seconds=engine.train_seconds,
                resident_bytes=engine.resident_bytes,
            ),
            journal=schemas.Journal(up=journal.up, since=journal.since, reason=journal.reason),
            learners={state.value: states[state] for state in LearnerState},
            quarantined=quarantined[:_MOST_NAMED],
            open_streams=service.open_streams,
            unreadable=dict(service.unreadable()),
            queued_batches=sum(record.queued_batches for record in learners),
            steps=sum(steps),
            examples=sum(examples),
        )

    @app.get("/livez", tags=["server"], summary="Is the process alive?")
    async def livez() -> schemas.Health:
        """Answers as long as the process can. If it does not, restart the process."""
        return schemas.Health(status="ok", reasons=[])

    @app.get("/readyz", tags=["server"], summary="Should requests come here?", responses=_UNREADY)
    async def readyz(response: Response) -> schemas.Health:
        """503 while starting, while the engine process is down and while shutting down."""
        reasons = list(service.readiness())
        if reasons:
            response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return schemas.Health(status="unavailable" if reasons else "ok", reasons=reasons)

    @app.get("/metrics", tags=["server"], summary="Prometheus metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """OpenMetrics if the Accept header asks for it, otherwise the Prometheus text format."""
        text_format = TextFormat.accepted(request.headers.get("accept", ""))
        text = await exposition.text(text_format)
        return Response(text, headers={"Content-Type": text_format.content_type})

    @app.get("/", include_in_schema=False)
    async def status_page() -> FileResponse:
        return FileResponse(_STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> FileResponse:
        return FileResponse(_STATIC / "docs.html")

    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    return app
