"""The page and the JSON endpoint as one web server.

    curl -s localhost:7860/imagedex/search -H 'content-type: application/json' \
        -d '{"query": ["two dogs", "on a beach"], "top_k": 3, "where": "width >= 1000"}'
    {"query": ["two dogs", "on a beach"], "images": ["a.jpg", ...], "scores": [0.31, ...], "milliseconds": 21.4}
"""

import logging
import socket
from collections.abc import Sequence
from typing import Annotated

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from PIL import Image
from pydantic import BaseModel, Field

from imagedex.errors import UserError
from imagedex.gallery.gallery import Gallery
from imagedex.gallery.pictures import of_the_machine, open_picture, reason
from imagedex.page.page import HEAD, ROUTE, build
from imagedex.page.service import LONGEST_QUERY, MOST_FOUND, Question, Service, jpeg

logger = logging.getLogger(__name__)

LARGEST = 1600  # pixels of a picture that is shown large
KEPT_BY_BROWSERS = {"Cache-Control": "private, max-age=3600"}
MOST_PIXELS = 40_000_000
MOST_ASKED = 2**18  # bytes of a question
LARGEST_UPLOAD = "20mb"


class Asked(BaseModel):
    """The body of a request. query: sentences, which are added; those in `without` are taken off."""

    query: list[Annotated[str, Field(max_length=LONGEST_QUERY)]] = Field(max_length=16)
    without: str = Field("", max_length=LONGEST_QUERY)
    top_k: int = Field(10, ge=1, le=MOST_FOUND)
    where: str = Field("", max_length=LONGEST_QUERY)
    fold: bool = False


def application(galleries: Sequence[Gallery], title: str = "imagedex") -> FastAPI:
    """The page at /, pictures and the endpoint below /imagedex."""
    service = Service(galleries)
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def bounded(request, call_next):
        length = request.headers.get("content-length", "")
        if request.url.path == ROUTE + "/search" and not (length.isdecimal() and int(length) <= MOST_ASKED):
            return Response("a question this long is not read", status_code=413)
        return await call_next(request)

    @app.get(ROUTE + "/thumbnail/{number}/{key}")
    def thumbnail(number: int, key: str):
        return picture_response(lambda: service.thumbnail(number, key))

    @app.get(ROUTE + "/picture/{number}/{key}")
    def picture(number: int, key: str):
        path = service.path(number, key)
        return picture_response(lambda: None if path is None else jpeg(open_picture(path), LARGEST))

    @app.post(ROUTE + "/search")
    def search(asked: Asked):
        question = Question(asked.query, asked.without, where=asked.where, top_k=asked.top_k, fold=asked.fold)
        try:
            answer = service.answer(0, question)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        return {
            "query": asked.query,
            "images": [card.title for card in answer.cards],
            "scores": [round(card.score, 6) for card in answer.cards],
            "milliseconds": round(answer.milliseconds, 1),
        }

    blocks = build(service, title)
    return gr.mount_gradio_app(
        app, blocks, path="/", max_file_size=LARGEST_UPLOAD, head=HEAD, theme=gr.themes.Soft(), show_error=False,
        ssr_mode=False, footer_links=[], enable_monitoring=False,
    )  # fmt: skip


def picture_response(make) -> Response:
    try:
        content = make()
    except Exception as error:
        if of_the_machine(error):
            raise
        logger.warning("a picture of the gallery cannot be read any more: %s", reason(error))
        content = None
    if content is None:
        raise HTTPException(404, "there is no such picture")
    return Response(content, media_type="image/jpeg", headers=KEPT_BY_BROWSERS)


def serve(galleries: Sequence[Gallery], host: str, port: int) -> None:
    """Until it is stopped."""
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on: {' '.join(str(error).split())}") from error
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # of what visitors send
    app = application(galleries)
    print(f"http://{host}:{port}  ({len(galleries[0])} pictures; Ctrl-C ends it)", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    server.run(sockets=[listening])
