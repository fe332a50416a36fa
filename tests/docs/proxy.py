"""A reverse proxy for the nginx tutorial: nginx itself if it is installed, else one that removes the same prefix."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.conftest import until

PREFIX = re.compile(r"location (/\S+/) \{\s*proxy_pass http://(\w+)/;")
NGINX = """daemon off; pid {root}/nginx.pid; error_log stderr; events {{}}
http {{
  access_log off; client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
  {site}
}}
"""
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


@contextmanager
def running_proxy(site: str, root: Path, port: int) -> Iterator[None]:
    """Serve the `upstream` and `server` of an nginx configuration, which listens on a port of loopback."""
    run = _nginx if shutil.which("nginx") else _stand_in
    with run(site, root, port):
        yield


@contextmanager
def _nginx(site: str, root: Path, port: int) -> Iterator[None]:
    configuration = root / "nginx.conf"
    configuration.write_text(NGINX.format(root=root, site=site))
    with (root / "nginx.log").open("wb") as log:
        nginx = subprocess.Popen(["nginx", "-p", root, "-c", configuration], stderr=log)
    try:
        until(lambda: _listens(port) or nginx.poll() is not None, "nginx to listen")
        assert nginx.poll() is None, (root / "nginx.log").read_text()
        yield
    finally:
        nginx.terminate()
        nginx.wait()


def _listens(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port)
        connection.connect()
    except ConnectionRefusedError:
        return False
    connection.close()
    return True


@contextmanager
def _stand_in(site: str, root: Path, port: int) -> Iterator[None]:
    matched = PREFIX.search(site)
    assert matched, "no location that removes its prefix"
    prefix = matched[1]
    upstream = re.search(rf"upstream {matched[2]} \{{\s*server (\S+);", site)
    assert upstream, "no server of the upstream"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Forward the request without the prefix, and its answer."""
            if not self.path.startswith(prefix):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            connection = HTTPConnection(upstream[1])
            path = "/" + self.path.removeprefix(prefix)
            connection.request(self.command, path, body, dict(self.headers))
            response = connection.getresponse()
            self._answer(response.status, response.headers, response.read())
            connection.close()

        do_POST = do_HEAD = do_PUT = do_DELETE = do_GET

        def _answer(self, status: int, headers: HTTPMessage, content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
