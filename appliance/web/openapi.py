"""The API's description, OpenAPI 3.1, made from the routes and the types of their handlers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from appliance.web import parameters, schema
from appliance.web.problem import KINDS, MEDIA, ProblemObject
from appliance.web.routes import JSON
from appliance.web.tokens import Role
from capture.segment import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.web.routes import Route

BASE = "/api/v1"
_EVERY = ("bad-request", "too-many", "internal", "unavailable")
_TOKEN = ("unauthenticated", "forbidden", "not-recorded")


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the description of the routes."""
    components = schema.Components()
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components)
    components.of(ProblemObject)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Narrows review API", "version": VERSION,
            "description": "Find, read, prove and stop recorded sessions. Every read is recorded.",
        },
        "servers": [{"url": BASE}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components.schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _operation(route: Route, components: schema.Components) -> dict[str, Any]:
    fields = parameters.fields(route.given)
    told: dict[str, Any] = {
        "operationId": getattr(route.handler, "__name__", route.path),
        "summary": route.text,
        "parameters": [_parameter(f) for f in fields if f.given.where != "body"],
        "responses": {"200": _good(route, components), **_problems(route)},
    }  # fmt: skip
    if route.needs is None:
        told["security"] = []
    else:
        least = next(role for role in Role if route.needs in role.rights)
        told["x-narrows-role"] = least.value
    body = [field for field in fields if field.given.where == "body"]
    if body:
        content = {JSON: {"schema": _body(body)}}
        told["requestBody"] = {"required": True, "content": content}
    if any(field.given.where == "header" for field in fields):
        told["responses"]["206"] = {
            **_good(route, components), "description": "the part that was asked for",
        }  # fmt: skip
    return told


def _parameter(field: parameters.Field) -> dict[str, Any]:
    return {
        "name": field.name, "in": field.given.where, "description": field.given.text,
        "required": field.required, "schema": schema.of_parameter(field),
    }  # fmt: skip


def _body(fields: list[parameters.Field]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            field.name: {**schema.of_parameter(field), "description": field.given.text}
            for field in fields
        },
        "required": [field.name for field in fields if field.required],
        "additionalProperties": False,
    }


def _good(route: Route, components: schema.Components) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.media == JSON:
        content["schema"] = components.of(route.answers)
    elif route.media == "application/octet-stream":
        content["schema"] = {"type": "string", "format": "binary"}
    else:
        content["schema"] = {"type": "string"}
    found = {route.media: content}
    for media in route.also:
        found[media] = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "the answer", "content": found}


def _problems(route: Route) -> dict[str, Any]:
    words = [*_EVERY, *route.may]
    if route.needs is not None:
        words += _TOKEN
    if re.search(r"\{session\}", route.path) and "not-found" not in words:
        words.append("not-found")
    if route.method == "POST":
        words += ["too-large", "timeout"]
    found: dict[str, list[str]] = {}
    for word in words:
        found.setdefault(str(KINDS[word][0]), []).append(KINDS[word][1])
    content = {MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": "; ".join(titles), "content": content}
        for status, titles in sorted(found.items())
    }
