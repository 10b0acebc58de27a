"""An HTTP proxy before the S3 server that goes away, or answers errors, when it is told to."""

import asyncio
import random
import threading
from collections.abc import Coroutine
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web
from yarl import URL

LARGEST_BODY = 1 << 30  # bytes
OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class FaultyProxy:
    """Listens on `port` of this machine and passes on to `target`; errors are those of an overloaded S3."""

    def __init__(self, port: int, target: str) -> None:
        self.port, self.target = port, target
        self.error_rate = 0.0
        self.requests = self.errors = 0
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()
        self._call(self._open())

    def down(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        self._call(self._site.stop())
        for transport in [handler.transport for handler in self._runner.server.connections]:
            if transport is not None:
                self._loop.call_soon_threadsafe(transport.abort)

    def up(self) -> None:
        """Listen again."""
        self._call(self._listen())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> None:
        self._client = ClientSession(auto_decompress=False, timeout=ClientTimeout(total=120))
        application = web.Application(client_max_size=LARGEST_BODY)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await self._site.start()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests += 1
        if self._random.random() < self.error_rate:
            self.errors += 1
            return web.Response(status=503, text="<Error><Code>SlowDown</Code><Message>reduce</Message></Error>")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in OF_A_HOP}
        headers["Host"] = request.headers["Host"]
        url = URL(self.target + request.raw_path, encoded=True)
        async with self._client.request(request.method, url, headers=headers, data=body) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in OF_A_HOP}
            content = await answer.read()
            if request.method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, headers=kept, body=content)
