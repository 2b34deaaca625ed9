"""The page and the JSON endpoint as one web server.

    curl -s localhost:7860/imagedex/search -H 'content-type: application/json' \
        -d '{"query": ["two dogs", "on a beach"], "top_k": 3, "where": "width >= 1000"}'
    {"query": ["two dogs", "on a beach"], "images": ["a.jpg", ...], "scores": [0.31, ...], "milliseconds": 21.4}
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Annotated

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

from imagedex.errors import UserError
from imagedex.gallery.gallery import Gallery
from imagedex.gallery.pictures import of_the_machine, reason
from imagedex.page.answers import LONGEST_QUERY, MOST_FOUND, Question, knows_when_nothing_matches
from imagedex.page.page import HERE, LOOKS, ROUTE, build
from imagedex.page.service import Service
from imagedex.page.uploads import LARGEST_FILE, MOST_UPLOADS

logger = logging.getLogger(__name__)

LARGEST = 1600  # pixels of a picture that is shown large
KEPT_BY_BROWSERS = {"Cache-Control": "private, max-age=3600"}
MOST_ASKED = 2**18  # bytes of a question
MOST_SENT = MOST_UPLOADS * LARGEST_FILE // 4  # bytes of a visitor's pictures together
MOST_WAITING = 1000  # visitors; more are told to come back


class Asked(BaseModel):
    """The body of a request. query: sentences, which are added; that in `without` is taken off. keep: leaves out what probably
    does not match."""

    query: list[Annotated[str, Field(max_length=LONGEST_QUERY)]] = Field(max_length=16)
    without: str = Field("", max_length=LONGEST_QUERY)
    top_k: int = Field(10, ge=1, le=MOST_FOUND)
    where: str = Field("", max_length=LONGEST_QUERY)
    fold: bool = False
    keep: float | None = Field(None, gt=0, lt=1)


def application(galleries: Sequence[Gallery], title: str = "imagedex", keep: float | None = None) -> FastAPI:
    """The page at /, pictures and the endpoint below /imagedex. Args: keep, see `build`."""
    service = Service(galleries)
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Bounded)

    @app.get(ROUTE + "/thumbnail/{number}/{key}")
    async def thumbnail(number: int, key: str):
        return await picture_response(service.thumbnail(number, key))

    @app.get(ROUTE + "/picture/{number}/{key}")
    async def picture(number: int, key: str):
        return await picture_response(service.picture(number, key, LARGEST))

    @app.post(ROUTE + "/search")
    async def search(asked: Asked):
        question = Question(asked.query, asked.without, where=asked.where, top_k=asked.top_k, fold=asked.fold)
        question.keep = asked.keep
        try:
            answer = await asyncio.wrap_future(service.ask(0, question))
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        cards = [card for card in answer.cards if card.probable]
        return {
            "query": asked.query,
            "images": [card.title for card in cards],
            "scores": [round(card.score, 6) for card in cards],
            "milliseconds": round(answer.milliseconds, 1),
        }

    os.environ["GRADIO_RUN_HISTORY"] = "False"  # what visitors asked would stay in their browsers
    blocks = build(service, title, keep).queue(max_size=MOST_WAITING)
    return gr.mount_gradio_app(
        app, blocks, path="/", max_file_size=LARGEST_FILE, css_paths=HERE / "page.css", theme=LOOKS,
        show_error=False, ssr_mode=False, footer_links=[], enable_monitoring=False,
    )  # fmt: skip


class Bounded:
    """Refuses what is larger than anyone needs to send, before it is read."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            most = MOST_SENT if scope["path"].endswith("/upload") else MOST_ASKED
            if not (length.isdigit() and int(length) <= most):
                answer = Response("this is more than is read", status_code=413)
        await answer(scope, receive, send)


async def picture_response(making: Future) -> Response:
    try:
        content = await asyncio.wrap_future(making)
    except Exception as error:
        if of_the_machine(error):
            raise
        logger.warning("a picture of the gallery cannot be read any more: %s", reason(error))
        content = None
    if content is None:
        raise HTTPException(404, "there is no such picture")
    return Response(content, media_type="image/jpeg", headers=KEPT_BY_BROWSERS)


def serve(galleries: Sequence[Gallery], host: str, port: int, keep: float | None = None) -> None:
    """Until it is stopped."""
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on: {' '.join(str(error).split())}") from error
    if keep is not None and not any(map(knows_when_nothing_matches, galleries)):
        raise UserError(
            "--keep: the model has no cut-off; take an XMatchingModel that was trained with held-out captions"
        )
    app = application(galleries, keep=keep)
    with contextlib.suppress(ImportError):  # where it is there, Gradio loads it while the first visitors wait
        import matplotlib.pyplot  # noqa: F401
    print(f"http://{host}:{port}  ({len(galleries[0])} pictures; Ctrl-C ends it)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    server.run(sockets=[listening])
