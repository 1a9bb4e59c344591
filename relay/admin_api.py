"""The routes that concern no single stream: for operators, dashboards and orchestrators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.api import Guarded, Json, run_object, stream_object
from relay.errors import InvalidParameter, JournalError
from relay.limits import check_stream_name
from relay.metrics import CONTENT_TYPE
from relay.replay.request import read_limit, read_time
from relay.security import Right

if TYPE_CHECKING:
    from relay.app import App


def admin_routes(app: App) -> list[Route]:
    """The routes that concern no single stream."""
    admin = AdminRoutes(app)
    guarded = partial(Guarded, app.access, Right.ADMIN)
    return [
        guarded("/relay/v1/streams", admin.streams),
        guarded("/relay/v1/streams", admin.delete_streams, "DELETE"),
        guarded("/relay/v1/runs", admin.ended_runs),
        guarded("/relay/v1/diagnostics", admin.diagnostics),
        guarded("/relay/metrics", admin.metrics),
    ]


def health_routes(app: App) -> list[Route]:
    """What an orchestrator asks of a process."""
    health = HealthRoutes(app)
    return [Route("/relay/healthz", health.healthz), Route("/relay/readyz", health.readyz)]


class HealthRoutes:
    """Whether this process lives, and whether it takes requests."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def healthz(self, request: Request) -> Response:
        """Alive, whatever else is wrong."""
        return Json({"status": "alive"} | self._worker())

    async def readyz(self, request: Request) -> Response:
        """Ready unless draining; the journal's state is a field."""
        return Json(
            {
                "status": "draining" if self._app.draining else "ready",
                "journal": await _journal_state(self._app),
            }
            | self._worker(),
            status_code=503 if self._app.draining else 200,
        )

    def _worker(self) -> dict[str, int]:
        """Which of several workers answers."""
        return {} if self._app.place is None else {"worker": self._app.place.number}


async def _journal_state(app: App) -> str:
    try:
        await app.journal.tops(["-"])
    except JournalError:
        return "down"
    return "up"


class AdminRoutes:
    """What concerns all streams, or none."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def streams(self, request: Request) -> Response:
        """`GET /relay/v1/streams`: streams by name, paged with `after` and `limit`."""
        limit = read_limit(request.query_params, 100)
        infos = await self._app.journal.streams(request.query_params.get("after", ""), limit + 1)
        page = infos[:limit]
        return Json(
            {
                "streams": [stream_object(info) for info in page],
                "after": page[-1].stream if page else None,
                "more": len(infos) > limit,
            }
        )

    async def delete_streams(self, request: Request) -> Response:
        """`DELETE /relay/v1/streams?prefix=`: every stream whose name begins so, as each alone is deleted."""
        prefix = request.query_params.get("prefix", "")
        if not prefix:
            raise InvalidParameter("A prefix of the streams to delete is missing.", parameter="prefix")
        check_stream_name(prefix)
        return Json({"prefix": prefix, "deleted": await self._app.delete_under(prefix)})

    async def ended_runs(self, request: Request) -> Response:
        """`GET /relay/v1/runs`: runs of every stream in the order of their endings, paged."""
        params = request.query_params
        limit = read_limit(params, 100)
        ended_after = read_time(params, "ended_after")
        found = await self._app.journal.ended_runs(ended_after, params.get("after", ""), limit + 1)
        page = found[:limit]
        return Json(
            {
                "runs": [run_object(ended.stream, ended.info) for ended in page],
                "after": page[-1].place if page else None,
                "more": len(found) > limit,
            }
        )

    async def diagnostics(self, request: Request) -> Response:
        """`GET /relay/v1/diagnostics`: what is held open here, and how what was held ended."""
        return Json(await self._app.diagnosis())

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        app = self._app
        app.metrics.journal_is(await app.examine_journal())
        app.measure()
        return Response(app.metrics.exposition(), headers={"content-type": CONTENT_TYPE})
