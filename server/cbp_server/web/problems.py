"""Every HTTP error as problem details (RFC 9457)."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cbp import CbpError
from cbp_server.errors import describe

MEDIA_TYPE = "application/problem+json"


class Violation(BaseModel):
    field: str = Field(description="Path of the field that is wrong.")
    description: str = Field(description="What is wrong with it.")


class Problem(BaseModel):
    """An error, as RFC 9457 lays it out."""

    title: str = Field(description="The kind of error in a few words, the same each time.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What went wrong this time and what to do.")
    instance: str = Field(description="Path of the request.")
    type: str = Field(
        default="about:blank", description="`urn:cbp:error:` and the reason; about:blank if the status says it all."
    )
    reason: str | None = Field(default=None, description="The kind of error for programs, the same over gRPC and HTTP.")
    violations: list[Violation] = Field(default=[], description="The fields that are wrong, if it is about fields.")


#: For `responses=` of a route.
PROBLEM_CONTENT: dict[str, Any] = {"model": Problem, "content": {MEDIA_TYPE: {}}}


def install_problem_handlers(app: FastAPI) -> None:
    """Makes `app` answer every error, its own and the framework's, with problem details."""
    app.add_exception_handler(CbpError, _domain_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _domain_error)


def _respond(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    content = problem.model_dump(exclude_none=True, exclude={"violations"} if not problem.violations else None)
    return JSONResponse(content, status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def _domain_error(request: Request, error: Exception) -> JSONResponse:
    described = describe(error)
    problem = Problem(
        type=f"urn:cbp:error:{described.reason}",
        title=described.title,
        status=described.http_status,
        detail=described.message,
        instance=request.url.path,
        reason=described.reason,
        violations=[Violation(field=item.field, description=item.description) for item in described.violations],
    )
    retry = described.retry_seconds
    return _respond(problem, {"Retry-After": str(max(1, round(retry)))} if retry is not None else None)


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    violations = [
        Violation(field=".".join(str(part) for part in item["loc"]), description=item["msg"]) for item in error.errors()
    ]
    problem = Problem(
        type="urn:cbp:error:INVALID_ARGUMENT",
        title="Invalid request",
        status=HTTPStatus.UNPROCESSABLE_ENTITY,
        detail="; ".join(f"{item.field}: {item.description}" for item in violations),
        instance=request.url.path,
        reason="INVALID_ARGUMENT",
        violations=violations,
    )
    return _respond(problem)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path}; /docs lists what there is"
    problem = Problem(
        title=HTTPStatus(error.status_code).phrase,
        status=error.status_code,
        detail=detail,
        instance=request.url.path,
    )
    return _respond(problem, dict(error.headers or {}))
