"""Several clients at once give odd files to the demo page and to `hpool-vit predict`, and count the answers."""

import contextlib
import json
import os
import socket
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from odd_files import OddFile
from work import HPOOL_VIT, environment, peak_bytes, run


# For one request: four clients wait for each other.
REQUEST_SECONDS = 60
START_SECONDS = 180
API = "/gradio_api"


def soak_predict(model: Path, files: list[OddFile], clients: int, folder: Path) -> dict[str, Any]:
    """Each client runs `hpool-vit predict` on all files. All of them must get the same answers."""
    names = b"\0".join(os.fsencode(file.path) for file in files)
    (folder / "names").write_bytes(names + b"\0")

    def ask(number: int) -> tuple[list[str], str]:
        output = folder / f"answers{number}.jsonl"
        words = [*HPOOL_VIT, "predict", str(model), "-", "--output", str(output), "--disable_tqdm", "--device", "cpu"]
        with (folder / "names").open("rb") as stdin:
            result = run(words, stdin=stdin)
        lines = output.read_text().splitlines() if output.exists() else []
        is_clean = result.returncode == 1 and "Traceback" not in result.stderr
        return lines, "" if is_clean else f"predict ended with {result.returncode}: {result.stderr[-300:]!r}"

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    problems = [problem for _, problem in answers if problem]
    if any(lines != answers[0][0] for lines, _ in answers):
        problems.append("predict: the clients got different answers")
    outcomes = {}
    for line in answers[0][0]:
        record = json.loads(line)
        outcomes[record["file"]] = record.get("error") or "answered"
    return count(files, lambda file: outcomes.get(str(file.path)), problems) | {"clients": clients}


def soak_page(model: Path, files: list[OddFile], clients: int, folder: Path) -> dict[str, Any]:
    """The clients share the files. Afterwards the page must still answer."""
    outcomes: dict[Path, str] = {}
    with serve(model, folder) as (address, process):
        parts = [files[number::clients] for number in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            start = time.monotonic()
            for answers in pool.map(lambda part: visit(address, part), parts):
                outcomes |= answers
            seconds = time.monotonic() - start
        after = visit(address, files[:1])[files[0].path]
        peak = peak_bytes(process.pid)
    log = (folder / "page.txt").read_text(errors="backslashreplace")
    problems = [f"page: {log[-300:]!r}"] * ("Traceback" in log)
    problems += [f"page: after all files, {after}"] * (after != "answered")
    result = count(files, lambda file: outcomes.get(file.path), problems)
    return result | {"clients": clients, "requests_per_second": round(len(files) / seconds, 1), "peak_bytes": peak}


def count(files: list[OddFile], outcome: Callable[[OddFile], str | None], problems: list[str]) -> dict[str, Any]:
    """How many files were answered and refused, and as `lost` those that got no answer or another than expected."""
    counts, lost = Counter(), list(problems)
    for file in files:
        given = outcome(file)
        kind = "crashed" if given is None or given.startswith("crash") else "refused"
        counts[kind if given != "answered" else "answered"] += 1
        if given is None or given.startswith("crash") or (given == "answered") != file.is_usable:
            lost.append(f"{file.path.name!a} ({file.kind}): {given}")
    return {"files": len(files), **{name: counts[name] for name in ("answered", "refused", "crashed")}, "lost": lost}


@contextlib.contextmanager
def serve(model: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The demo page on a free port of this machine, which ends with the block. Its output goes to page.txt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*HPOOL_VIT, "demo", str(model), "--server_port", str(port)]
    settings = {**environment(), "GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_SERVER_NAME": "127.0.0.1"}
    log = folder / "page.txt"
    with log.open("w") as file, subprocess.Popen(words, env=settings, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while "The page is at" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The page does not start: {log.read_text()[-500:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


def visit(address: str, files: list[OddFile]) -> dict[Path, str]:
    """One visitor gives the page one file after the other. Returns what each one led to."""
    with httpx.Client(base_url=address, timeout=REQUEST_SECONDS, trust_env=False) as client:
        visitor = Visitor(client)
        return {file.path: visitor.give(file.path) for file in files}


class Visitor:
    """Does what the page's code in a browser does, over HTTP."""

    def __init__(self, client: httpx.Client):
        self.client, self.session = client, uuid.uuid4().hex
        config = client.get("/config").raise_for_status().json()
        events = config["dependencies"]
        upload = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "upload")
        self.model = next(part for part in config["components"] if part["props"].get("elem_id") == "model")
        self.upload = next(event["id"] for event in events if event["inputs"] == [upload])
        # The answer takes model, schedule, files and the chosen image.
        self.answer = next(
            event["id"] for event in events if len(event["inputs"]) == 4 and event["inputs"][0] == self.model["id"]
        )

    def give(self, path: Path) -> str:
        """`answered`, the reason of a refusal, or `crash` and what happened."""
        try:
            response = self.send(path)
            if response.is_client_error:
                return f"refused by the upload: {response.status_code}"
            response.raise_for_status()
            given = [{"path": response.json()[0], "orig_name": "file", "meta": {"_type": "gradio.FileData"}}]
            self.call(self.upload, [given])
            _, messages, _, _, classes, _ = self.call(self.answer, [self.model["props"]["value"], 0, None, None])
            if value_of(classes):
                return "answered"
            return value_of(messages) or "crash: neither an answer nor a message"
        except (httpx.HTTPError, RuntimeError, ValueError, KeyError) as error:
            return f"crash: {type(error).__name__} {error}"

    def send(self, path: Path) -> httpx.Response:
        """Uploads a file under its name, whose bytes need not be UTF-8."""
        boundary = uuid.uuid4().hex.encode()
        name = os.fsencode(path.name).replace(b'"', b"")
        head = b'--%b\r\nContent-Disposition: form-data; name="files"; filename="%b"\r\n' % (boundary, name)
        body = head + b"Content-Type: application/octet-stream\r\n\r\n" + path.read_bytes()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}
        return self.client.post(f"{API}/upload", content=body + b"\r\n--%b--\r\n" % boundary, headers=headers)

    def call(self, function: int, data: list[Any]) -> list[Any]:
        """Puts an event into the queue, waits for its turn, and returns its outputs."""
        body = {"data": data, "fn_index": function, "session_hash": self.session, "event_data": None}
        self.client.post(f"{API}/queue/join", json=body).raise_for_status()
        deadline = time.monotonic() + REQUEST_SECONDS
        with self.client.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(f"the page failed: {message['output']}")
                    return message["output"]["data"]
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer in {REQUEST_SECONDS} s")
        raise RuntimeError("the connection ended without an answer")


def value_of(output: Any) -> Any:
    """The value of a component, or of an update of one."""
    return output.get("value", output.get("label")) if isinstance(output, dict) else output
