"""The page at ``/``: its files, and what they have to know of the server.

The files are in ``static/`` and served as they are.  They ask for nothing from elsewhere, which
the headers make sure of, and for nothing without the key of a user but themselves.
"""

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grpocem_jax.serving import asked
from grpocem_jax.serving.catalogue import Catalogue
from grpocem_jax.serving.http import Call, Gate, Json
from grpocem_jax.serving.tenants import Keys

TYPES = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
"""Of the files, by how their names end."""

HEADERS = {
    # Text of models and of users is no HTML either: the browser refuses to make elements of text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes(
    gate: Gate, keys: Keys, catalogue: Catalogue, *, most_tokens: int, most_prompt: int
) -> list[Route]:
    """The page, its files, and ``/page/settings``.

    Args:
      gate: which lets tenants in.
      keys: who is known.
      catalogue: the models.
      most_tokens: of a completion.
      most_prompt: of a prompt, in tokens.
    """
    files = _read(has_keys=keys.find(None) is None)

    async def show(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404)
        content, tag = files[name]
        headers = {**HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[name.rpartition(".")[2]], headers=headers)

    async def settings(call: Call) -> Response:
        limits = call.tenant.limits
        return Json(
            {
                **_of_models(catalogue),
                "tenant": call.tenant.name,
                "max_tokens": most_tokens,
                "max_prompt": most_prompt,
                "max_examples": limits.max_examples,
                "max_generations": limits.max_generations,
            }
        )

    endpoint = gate.endpoint("GET /page/settings", settings)
    return [
        Route("/", show, methods=["GET"]),
        Route("/page/settings", endpoint, methods=["GET"]),
        Route("/page/{name}", show, methods=["GET"]),
    ]


def _read(*, has_keys: bool) -> Mapping[str, tuple[bytes, str]]:
    """The files and a tag of what is in each, by name; the page says whether there are keys."""
    found = {}
    for path in (resources.files("grpocem_jax.serving") / "static").iterdir():
        if path.name.rpartition(".")[2] in TYPES:
            content = path.read_bytes()
            if has_keys:
                content = content.replace(b'<html lang="en">', b'<html lang="en" data-keys>')
            found[path.name] = content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return found


def _of_models(catalogue: Catalogue) -> dict[str, Any]:
    """What can be asked of the models, whoever asks."""
    run = catalogue.run
    form = run.policy.prompt_format
    return {
        "model": catalogue.default,
        "base": catalogue.base,
        "has_chat": form.render is not None,
        "is_chat": form.chat,
        "methods": [x for x in asked.METHODS if x != "experts" or catalogue.experts],
        "rewards": {x: list(run.config.task(x).columns) for x in asked.rewards(run.config)},
        "generations": run.config.search.generations,
    }
