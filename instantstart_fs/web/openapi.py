"""Describes the HTTP API as OpenAPI 3.1, from the table of verbs and the types that the control protocol uses."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from instantstart_fs import __version__
from instantstart_fs.control import protocol
from instantstart_fs.control.http_verbs import DEFAULT_TIMEOUT, LONGEST_TIMEOUT, VERBS, ErrorAnswer, Verb
from instantstart_fs.core.placement import Placement

_LINES = protocol.Progress | protocol.Done | protocol.Failed
_REFERENCE = "#/components/schemas/{name}"


@functools.cache
def document() -> bytes:
    """Return the document as JSON."""
    return msgspec.json.encode(describe()) + b"\n"


def describe() -> dict[str, Any]:
    """Return the document as plain objects."""
    results = [verb.result for verb in VERBS if verb.result is not None]
    arguments = [verb.arguments for verb in VERBS]
    types = [*results, *arguments, _LINES, ErrorAnswer, Placement]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    by_position = dict(enumerate(schemas))
    result_schemas = iter([by_position[at] for at in range(len(results))])
    argument_schemas = [by_position[len(results) + at] for at in range(len(arguments))]
    lines, error, placement = schemas[-3:]
    paths: dict[str, dict[str, Any]] = {}
    for verb, taken in zip(VERBS, argument_schemas, strict=True):
        result = next(result_schemas) if verb.result is not None else None
        shape = components[taken["$ref"].rpartition("/")[2]]
        paths.setdefault(verb.path, {})[verb.method.lower()] = _operation(verb, taken, shape, result, lines, error)
    paths["/v1/placement/{pipeline}"] = {
        "get": {
            "operationId": "placement",
            "summary": "Which hosts of the region hold it.",
            "parameters": [_pipeline()],
            "responses": {"200": _json("the hosts", placement), "default": _json("an error", error)},
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Instant Start FS",
            "version": __version__,
            "description": "The control protocol's verbs over HTTP; docs/HTTP.md.",
        },
        "servers": [{"url": "http://localhost", "description": "by the control socket: curl --unix-socket"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "over TCP alone"}},
        },
        "security": [{}, {"token": []}],
    }


def _operation(
    verb: Verb, taken: dict[str, Any], shape: dict[str, Any], result: Any, lines: Any, error: Any
) -> dict[str, Any]:
    parameters = [_pipeline()] if "{pipeline}" in verb.path else []
    parameters.append(
        {
            "name": "timeout",
            "in": "query",
            "description": "Seconds for which the answer is waited for; what was asked for goes on.",
            "schema": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": LONGEST_TIMEOUT,
                **({} if verb.streams == "always" else {"default": DEFAULT_TIMEOUT}),
            },
        }
    )
    found: dict[str, Any] = {
        "operationId": verb.path.rpartition("/")[2] if verb.fixed else verb.request.__struct_config__.tag,
        "summary": verb.says,
        "parameters": parameters,
        "responses": {"default": _json("an error", error)},
    }
    if verb.in_body and shape.get("properties"):
        needed = bool(shape.get("required"))
        found["requestBody"] = {"required": needed, "content": {"application/json": {"schema": taken}}}
    elif not verb.in_body:
        for name, schema in shape.get("properties", {}).items():
            needed = name in shape.get("required", ())
            parameters.append({"name": name, "in": "query", "required": needed, "schema": schema})
    if verb.streams == "always":
        found["responses"]["200"] = {"description": "lines", "content": {"application/x-ndjson": {"schema": lines}}}
    elif result is None:
        found["responses"]["204"] = {"description": "done"}
    else:
        answer = _json("the result", result)
        if verb.streams == "asked":
            answer["content"]["application/x-ndjson"] = {"schema": lines}
        found["responses"][str(verb.status)] = answer
    return found


def _pipeline() -> dict[str, Any]:
    return {"name": "pipeline", "in": "path", "required": True, "schema": {"type": "string"}}


def _json(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
