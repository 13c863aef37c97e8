"""A reward server of one's own, in the standard library alone: `python server.py [PORT]`.

It speaks version 1 of the protocol in docs/reward-server.md. Put your judge, verifier or model into `score`.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHEERFUL = {"happy", "fun", "smiled", "laughed", "love", "loved", "friends", "thank", "nice", "kind", "proud", "hugged"}


def score(prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> list[float | None]:
    """Returns one reward per completion, None where there is none: cheerful words per ten words of a story."""
    stories = [[word.strip('.,!?"').lower() for word in story.split()] for story in completions]
    return [10 * sum(word in CHEERFUL for word in words) / len(words) if words else None for words in stories]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Keeps connections open between the steps.

    def do_GET(self) -> None:
        known = self.path == "/health"
        self._reply(200 if known else 404, {"status": "ok", "version": 1} if known else {"error": "unknown path"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/score" or request["version"] != 1:
            return self._reply(400, {"error": "only version 1 of /score is known"})
        rewards = score(request["prompts"], request["completions"], request.get("columns", {}))
        return self._reply(200, {"version": 1, "rewards": rewards})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass  # A line per request would be a line per step.


if __name__ == "__main__":
    # Whoever can reach it can use it: on another address than this one, add a token or a proxy that checks one.
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Handler)
    print(f"Rewards are served at http://127.0.0.1:{server.server_port}.", flush=True)
    server.serve_forever()
