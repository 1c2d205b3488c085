"""A server that answers like Vault, with one document, and with a clock and a certificate of one's choice.

``python tls_vault.py CERTIFICATE KEY ADVANCE_S DOCUMENT``: prints its port on 127.0.0.1, and serves until it is ended.
What a real Vault cannot be made to say on a machine with one clock.
"""

from __future__ import annotations

import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


def main(certificate: str, key: str, advance_s: str, document: str) -> None:
    """Serve."""

    class Handler(BaseHTTPRequestHandler):
        """Answers everything with the document."""

        def date_time_string(self, timestamp: float | None = None) -> str:
            """Return the header ``Date`` of a clock that is ahead."""
            return super().date_time_string((time.time() if timestamp is None else timestamp) + float(advance_s))

        def do_POST(self) -> None:
            """Answer a login."""
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            """Answer."""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(document.encode())

        def log_message(self, *_: object) -> None:
            """Keep still."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
