"""A stand-in for the hub: what huggingface_hub asks of it to create a repository and upload files, over HTTP.

Files up to a commit's size come inside the commit, weights as objects of git LFS. HF_HUB_DISABLE_XET=1 in the
environment of the uploading process makes it use that protocol, which the hub has beside its newer one.
"""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def may_write(self, name):
        """Whether the request's token may write to ORG/NAME; answers the request if not."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        organisations = self.server.tokens.get(token)
        if organisations is None:
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif name.split("/")[0] not in organisations:
            self.answer({"error": f"You don't have the rights to create a model under {name}"}, 403)
        else:
            return True
        return False

    def do_PUT(self):
        content = self.body()
        self.server.objects[self.path.removeprefix("/objects/")] = content
        self.answer({})

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        if name not in self.server.repositories:
            self.answer({"error": "Repository not found"}, 404)
            return
        self.answer({"id": name, "private": self.server.repositories[name]["private"], "sha": "0" * 40})

    def do_POST(self):
        body = self.body()
        self.server.requests.append(self.path)
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": self.mode(path), "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"objects": [self.action(item) for item in json.loads(body)["objects"]]})
        else:
            self.commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def mode(self, path):
        return "lfs" if path.endswith(".safetensors") else "regular"

    def action(self, item):
        return item | {"actions": {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}}

    def create(self, request):
        name = f"{request['organization']}/{request['name']}"
        if not self.may_write(name):
            return
        if name in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
            return
        is_private = request.get("visibility") == "private"
        self.server.repositories[name] = {"private": is_private, "files": {}, "messages": []}
        self.answer({"url": f"{self.server.url}/{name}"})

    def commit(self, name, body):
        if not self.may_write(name):
            return
        repository = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository["messages"].append(value["summary"])
            elif entry["key"] == "file":
                assert self.mode(value["path"]) == "regular"
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                content = self.server.objects[value["oid"]]
                assert (hashlib.sha256(content).hexdigest(), len(content)) == (value["oid"], value["size"])
                repository["files"][value["path"]] = content
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40})


@contextmanager
def stand_in(**tokens):
    """A running stand-in; tokens: {token: organisations it may write to}.

    .url; .repositories {ORG/NAME: {"private", "files": {path: bytes}, "messages"}}; .requests: paths that were posted.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.tokens = tokens
    server.repositories = {}
    server.objects = {}
    server.requests = []
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
