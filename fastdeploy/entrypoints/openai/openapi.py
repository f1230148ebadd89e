"""The description of the API: /openapi.json from the structs, and /docs, one page that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import msgspec

import fastdeploy
from fastdeploy.entrypoints.openai.catalog import Endpoint
from fastdeploy.entrypoints.openai.responses import ErrorBody

_REF = "#/components/schemas/{name}"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; font-size: 1.1rem; border-bottom: 1px solid #ccc }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #eee }
.method { color: #06c } .missing { color: #888 }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } pre { background: #242424 } td, th { border-color: #333 }
}
"""


def openapi(endpoints: Sequence[Endpoint], needs_key: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 description of `endpoints`; paths under /v1 ask for a Bearer key when `needs_key`."""
    kinds = [kind for e in endpoints for kind in (e.body, e.answer) if kind is not None] + [ErrorBody]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    described: dict[str, Any] = {"schemas": components}
    if needs_key:
        described["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, needs_key)
        name = endpoint.path.strip("/").replace("/", "_")
        paths[endpoint.path] = {
            m.lower(): {**operation, "operationId": f"{m.lower()}_{name}"} for m in endpoint.methods
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastdeploy", "version": fastdeploy.__version__},
        "paths": paths,
        "components": described,
    }


def _operation(endpoint: Endpoint, needs_key: bool) -> dict[str, Any]:
    problem = {"description": "An error.", "content": _content("application/json", ErrorBody)}
    answer: dict[str, Any] = {"description": "OK"}
    if endpoint.answer is not None or endpoint.answer_type != "application/json":
        answer["content"] = _content(endpoint.answer_type, endpoint.answer)
    if endpoint.kind is not None:
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "responses": {"200": answer, "default": problem} if endpoint.supported else {"501": problem},
    }
    if endpoint.body is not None:
        content = _content("application/json", endpoint.body)
        if endpoint.example is not None:
            content["application/json"]["example"] = endpoint.example
        operation["requestBody"] = {"required": True, "content": content}
    if needs_key and endpoint.path.startswith("/v1"):
        operation["security"] = [{"key": []}]
    return operation


def _content(media_type: str, kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    schema = {"type": "string"} if kind is None else {"$ref": _REF.format(name=kind.__name__)}
    return {media_type: {"schema": schema}}


def docs_page(endpoints: Sequence[Endpoint], model: str, base_url: str, needs_key: bool) -> str:
    """The same as a page for people: every endpoint with its fields and a command to try it."""
    kinds = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    sections = [_section(endpoint, schemas, base_url, needs_key) for endpoint in endpoints if endpoint.supported]
    missing = "".join(
        f"<li class=missing><code>{'/'.join(e.methods)} {html.escape(e.path)}</code> {html.escape(e.summary)}</li>"
        for e in endpoints
        if not e.supported
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>fastdeploy API</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style></head><body>"
        f"<h1>fastdeploy {fastdeploy.__version__}</h1><p>Serves <code>{html.escape(model)}</code>. "
        "The same for programs: <a href=/openapi.json>/openapi.json</a>. Errors have the body "
        "<code>{&quot;error&quot;: {message, type, param, code}}</code>.</p>"
        f"{''.join(sections)}<h2>Not supported</h2><ul>{missing}</ul></body></html>"
    )


def _section(endpoint: Endpoint, schemas: dict[str, Any], base_url: str, needs_key: bool) -> str:
    methods = html.escape("/".join(endpoint.methods))
    fields = ""
    if endpoint.body is not None:
        shape = schemas[endpoint.body.__name__]
        rows = "".join(
            _row(name, field, name in shape.get("required", ())) for name, field in shape["properties"].items()
        )
        fields = f"<details open><summary>Fields</summary><table>{rows}</table></details>"
    command = html.escape(curl(endpoint, base_url, needs_key))
    return (
        f"<h2><span class=method>{methods}</span> <code>{html.escape(endpoint.path)}</code></h2>"
        f"<p>{html.escape(endpoint.summary)}</p><pre>{command}</pre>{fields}"
    )


def curl(endpoint: Endpoint, base_url: str, needs_key: bool) -> str:
    """A command line that calls the endpoint."""
    parts = [f"curl {base_url}{endpoint.path}"]
    if needs_key and endpoint.path.startswith("/v1"):
        parts.append("-H 'Authorization: Bearer KEY'")
    if endpoint.example is not None:
        parts += ["-H 'Content-Type: application/json'", f"-d '{json.dumps(endpoint.example)}'"]
    return " \\\n  ".join(parts)


def _row(name: str, field: dict[str, Any], required: bool) -> str:
    default = field.get("default")
    note = "required" if required else "" if default is None else f"default {json.dumps(default)}"
    about = " ".join(part["description"] for part in [field, *field.get("anyOf", ())] if "description" in part)
    cells = (f"<code>{html.escape(name)}</code>", html.escape(type_text(field)), note, html.escape(about))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: "integer 1 to 128"."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_text(s) for s in schema["anyOf"] if s.get("type") != "null"))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        kind = f"list of ({type_text(schema.get('items', {}))})"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    above = "above" if "exclusiveMinimum" in schema else "from"
    if low is not None:
        kind += f" {above} {low}"
    for word, limit in (("to", "maximum"), ("up to", "maxItems"), ("up to", "maxLength"), ("up to", "maxProperties")):
        if limit in schema:
            kind += f" {word} {schema[limit]}" + (" characters" if limit == "maxLength" else "")
    return kind
