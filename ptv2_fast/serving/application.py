"""The HTTP application: routes over an engine and a batcher."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer

from ptv2_fast import __version__
from ptv2_fast.serving import shapes
from ptv2_fast.serving.batching import Batcher, Row
from ptv2_fast.serving.errors import RequestError, error_body, unknown_adapter
from ptv2_fast.serving.folders import find_adapter
from ptv2_fast.serving.gate import Gate
from ptv2_fast.serving.metrics import Metrics
from ptv2_fast.serving.options import ServeOptions
from ptv2_fast.serving.shapes import Prediction

_LOG = logging.getLogger(__name__)
# Of the page, which is one file and asks nobody but this server.
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {404: "not_found", 405: "not_allowed"}  # of errors that are not ours
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": shapes.ErrorBody, "description": text}
    for status, text in {
        400: "broken JSON, or an empty text",
        401: "no key, or another",
        404: "an adapter that is not loaded, or is no more",
        413: "a body, a text or a batch that is too large",
        422: "a value of another type, or one that does not fit the adapter",
        429: "too many texts wait already",
        500: "the model failed",
        503: "the server is going down",
    }.items()
}


class Engine(Protocol):
    """Adapters on an encoder, as a server needs them."""

    model_name: str

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded."""

    def facts(self, name: str) -> dict[str, Any]:
        """What /v1/models says of an adapter beside its name."""

    def prepare(
        self, texts: Sequence[str | list[str]], adapters: Sequence[str], truncate: bool
    ) -> list[Row]:
        """The rows of texts, each for the adapter in its place.

        Raises:
            RequestError: for an unknown adapter, and a text that cannot be served.
        """

    def run(self, rows: Sequence[Row]) -> list[Prediction | Exception]:
        """A result for each row; of a row whose adapter went, a RequestError."""

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter; raises ValueError or OSError when it cannot be."""

    def unload(self, name: str) -> None:
        """Let an adapter go."""


class Service:
    """What the routes share: from texts to predictions, and the adapters' coming and going."""

    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.batcher = Batcher(
            engine.run, options.max_batch_tokens, options.max_wait_ms / 1000, self.metrics.observe
        )
        self.changing = asyncio.Lock()  # adapters, one at a time
        self._open = 0  # texts that are taken and not answered
        # Fast tokenizers are for one thread at a time.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokens")

    def close(self) -> None:
        """Answer what was taken, then end the threads."""
        self.batcher.close()
        self._tokenizing.shutdown()

    def named(self, given: str | list[str] | None) -> str | list[str]:
        """The adapters of a request, or the one that is loaded; all are known.

        Raises:
            RequestError: 404 for one that is not loaded, 422 where none is named and it matters.
        """
        known = self.engine.names
        if given is None:
            if len(known) != 1:
                message = f"adapter: expected a name, as {len(known)} are loaded, got none"
                raise RequestError(422, "validation", message)
            return known[0]
        for name in [given] if isinstance(given, str) else given:
            if name not in known:
                raise unknown_adapter(name, known)
        return given

    async def predict(
        self,
        request: Request,
        texts: Sequence[str | list[str]],
        adapters: Sequence[str],
        truncate: bool,
    ) -> list[Prediction]:
        """What the adapters say of the texts in the same places.

        Raises:
            RequestError: as it is to be answered.
        """
        count, limits = len(texts), self.options
        if count > limits.max_client_batch:
            raise RequestError(
                413, "validation", f"inputs: expected at most {limits.max_client_batch} texts in a "
                f"request, got {count}"
            )  # fmt: skip
        if self._open + count > limits.max_queue:
            raise RequestError(
                429, "overloaded", f"queue: {self._open} texts of at most {limits.max_queue} are "
                f"not answered yet, there is no room for {count}; try again later"
            )  # fmt: skip
        self._open += count
        try:
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(
                self._tokenizing, self.engine.prepare, texts, adapters, truncate
            )
            return await self._answer(request, rows)
        except HTTPException:
            raise
        except Exception as error:
            _LOG.exception("a batch failed")
            message = f"the model failed: {type(error).__name__}"
            raise RequestError(500, "backend", message) from error
        finally:
            self._open -= count

    async def _answer(self, request: Request, rows: list[Row]) -> list[Prediction]:
        """The results of the rows, which leave the queue when the client goes."""
        answer = asyncio.wrap_future(self.batcher.submit(rows))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise RequestError(499, "gone", "the client has gone")
            return await answer
        finally:
            answer.cancel()
            gone.cancel()

    async def load(self, name: str, folder: str) -> None:
        """Load an adapter from under the adapter root.

        Raises:
            RequestError: 409 for a name that is taken, 422 for what cannot be loaded.
        """
        assert self.options.adapter_root is not None
        async with self.changing:
            if name in self.engine.names:
                message = f"name: expected one that is not loaded yet, got {name!r}"
                raise RequestError(409, "conflict", message)
            try:
                place = find_adapter(self.options.adapter_root, folder)
                await asyncio.to_thread(self.engine.load, name, place)
            except (ValueError, OSError) as error:
                raise RequestError(422, "validation", " ".join(str(error).split())) from error

    async def unload(self, name: str) -> None:
        """Let an adapter go; requests that wait for it are answered with an error.

        Raises:
            RequestError: 404 for one that is not loaded.
        """
        async with self.changing:
            if name not in self.engine.names:
                raise unknown_adapter(name, self.engine.names)
            await asyncio.to_thread(self.engine.unload, name)
            self.batcher.drop(name)
            self.metrics.forget(name)


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(engine: Engine, options: ServeOptions) -> FastAPI:
    """The application. Its lifespan ends when what it took is answered."""
    service = Service(engine, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The key is the gate's matter; here it is named for the pages that describe the server.
    bearer = HTTPBearer(auto_error=False, description="the key of this server")
    app = FastAPI(
        title="ptv2-fast",
        version=__version__,
        description=f"Adapters on {engine.model_name}.",
        lifespan=lifespan,
        redoc_url=None,
        dependencies=[] if options.api_key is None else [Depends(bearer)],
    )
    _add_errors(app)
    _add_predictions(app, service)
    _add_state(app, service)
    if options.adapter_root is not None:
        _add_updates(app, service)
    service.metrics.paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(
        Gate,
        api_key=options.api_key,
        max_body_bytes=options.max_body_bytes,
        count=service.metrics.count,
    )
    return app


def _add_errors(app: FastAPI) -> None:
    """All errors in one shape."""

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        kind = getattr(error, "kind", _KINDS.get(error.status_code, "validation"))
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            words = f"body: expected JSON, got {first['ctx']['error']} at {first['loc'][-1]}"
            return JSONResponse(error_body(words, "validation"), 400)
        if isinstance(error.body, bytes):
            words = "content-type: expected application/json"
            return JSONResponse(error_body(words, "validation"), 415)
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse(error_body(f"{where}: {first['msg']}", "validation"), 422)

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body("the server failed", "internal"), 500)


def _add_predictions(app: FastAPI, service: Service) -> None:
    def post(path: str, model: Any, tag: str) -> Callable:
        answers = {200: {"model": model}, **_ERRORS}
        return app.post(path, response_model=None, responses=answers, tags=[tag])

    @post("/predict", shapes.Answers | list[shapes.Answers], "TEI")
    async def predict(body: shapes.PredictRequest, request: Request) -> Response:
        """Labels, spans or answers of a text; of several texts or adapters, a list of such."""
        if body.adapter is not None and body.model is not None:
            raise RequestError(422, "validation", "adapter: expected one of adapter and model")
        given = service.named(body.model if body.adapter is None else body.adapter)
        texts, alone = shapes.texts_of(body.inputs)
        texts, adapters = shapes.paired(texts, given)
        found = await service.predict(request, texts, adapters, body.truncate)
        lists = [shapes.answers(one, body) for one in found]
        return JSONResponse(lists[0] if alone and isinstance(given, str) else lists)

    async def run(body: shapes.InputRequest, request: Request) -> tuple[str, list[Prediction]]:
        name = service.named(body.model)
        assert isinstance(name, str)
        texts, _ = shapes.texts_of(body.input)
        found = await service.predict(request, texts, [name] * len(texts), body.truncate)
        return name, found

    @post("/v1/classify", shapes.ClassifyResponse, "vLLM")
    async def classify(body: shapes.InputRequest, request: Request) -> Response:
        """Probabilities of all labels, in the order of /v1/models."""
        name, found = await run(body, request)
        if any("words" in one.line or "n_best" in one.line for one in found):
            raise _other_task(name, "/v1/classify", "one label for a text")
        data = [shapes.classify_data(*pair) for pair in enumerate(found)]
        return JSONResponse(shapes.envelope("classify", name, data, found))

    @post("/v1/token_classify", shapes.TokenClassifyResponse, "vLLM")
    async def token_classify(body: shapes.InputRequest, request: Request) -> Response:
        """A label for each word, and the spans that they make."""
        name, found = await run(body, request)
        if not all("words" in one.line for one in found):
            raise _other_task(name, "/v1/token_classify", "labels of words")
        data = [shapes.token_data(*pair) for pair in enumerate(found)]
        return JSONResponse(shapes.envelope("token_classify", name, data, found))


def _other_task(name: str, path: str, wanted: str) -> RequestError:
    message = f"model: {path} expects an adapter that gives {wanted}, got {name!r}"
    return RequestError(422, "validation", f"{message}; /predict serves all")


def _add_state(app: FastAPI, service: Service) -> None:
    page = files("ptv2_fast.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while requests are served, else 503."""
        if not service.batcher.is_alive:
            raise RequestError(503, "unavailable", "the server takes no more requests")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Counters in the format of Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", tags=["state"])
    async def models() -> Response:
        """The adapters that are loaded, as OpenAI lists models."""
        engine = service.engine
        listed = []
        for name in engine.names:
            with contextlib.suppress(RequestError):  # of one that goes at this moment
                about = engine.facts(name)
                listed.append({"id": name, "object": "model", "owned_by": "ptv2-fast", **about})
        return JSONResponse({"object": "list", "data": listed})


def _add_updates(app: FastAPI, service: Service) -> None:
    @app.post("/v1/adapters/load", responses=_ERRORS, tags=["adapters"])
    async def load(body: shapes.LoadRequest) -> dict[str, str]:
        """Load an adapter from a folder under the adapter root of this server."""
        await service.load(body.name, body.folder)
        return {"loaded": body.name}

    @app.post("/v1/adapters/unload", responses=_ERRORS, tags=["adapters"])
    async def unload(body: shapes.UnloadRequest) -> dict[str, str]:
        """Let an adapter go; requests that wait for it get an error."""
        await service.unload(body.name)
        return {"unloaded": body.name}
