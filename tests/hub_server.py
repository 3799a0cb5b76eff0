"""A Hub that does wrong on purpose: the package's own server with faults around it, for tests, studies and benchmarks."""
from __future__ import annotations

import asyncio
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdl_devinfra.hub.server import LoopbackHub, RequestLog, path_parts, routes


@dataclass
class Fault:
    """Something that the server does wrong on purpose."""
    kind: str  # flip, zeros, short, long, cut, html, size, commit, etag, encoding, no-range, no-size, no-hash, slow, slow-body, status, listing
    path: str = "*"  # glob over the path of the file ("info" and "*" for listings); for slow and status over the path of the request
    value: Any = None  # flip: offset; cut, short: bytes sent; etag, commit, size, listing: what to say; slow: seconds; status: the code
    times: int | None = None  # how often; None is always


def is_active(fault: Fault, kind: str, path: str) -> bool:
    return fault.kind == kind and fnmatch.fnmatch(path, fault.path) and fault.times != 0


def take(faults: list[Fault], kind: str, path: str) -> Fault | None:
    """The first active fault of a kind for a path, counted down."""
    for fault in faults:
        if not is_active(fault, kind, path): continue
        if fault.times is not None: fault.times -= 1
        return fault
    return None


class FaultyHub(LoopbackHub):
    """A Hub in a thread of this process; the list `faults` may be changed while it runs."""

    def __init__(self, folder: str | Path, redirect: bool = False, faults: list[Fault] | None = None, **kwargs: Any):
        super().__init__(folder, redirect, **kwargs)
        self.faults = list(faults or [])

    def app(self) -> Any: return RequestLog(Faulty(routes(self), self.faults), self.seen)


class Faulty:
    """An ASGI application around a healthy one, with faults."""

    def __init__(self, app: Any, faults: list[Fault]): self.app, self.faults = app, faults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http": return await self.app(scope, receive, send)
        if slow := take(self.faults, "slow", scope["path"]): await asyncio.sleep(slow.value)
        if fault := take(self.faults, "status", scope["path"]): return await answer(send, fault.value, "a planted failure")
        parts = path_parts(scope["raw_path"])
        path = file_of(parts)
        if path is None: return await self.app(scope, receive, Listing(self.faults, parts, send))
        ranged = not any(is_active(fault, "no-range", path) for fault in self.faults)
        if not ranged: scope = scope | {"headers": [(k, v) for k, v in scope["headers"] if k.lower() != b"range"]}
        await self.app(scope, receive, FileReply(self.faults, path, scope["method"], send))


async def answer(send: Any, status: int, error: str) -> None:
    """A refusal, as the server words it."""
    body = json.dumps({"error": error}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "x-error-code": "", "x-error-message": error}
    await reply(send, status, headers, body)


async def reply(send: Any, status: int, headers: dict[str, str], body: bytes) -> None:
    told = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})


def headers_of(message: Any) -> dict[str, str]:
    return {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}


def with_headers(message: Any, headers: dict[str, str]) -> Any:
    return message | {"headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]}


def file_of(parts: list[str]) -> str | None:
    """The path of the file that a request asks for; None where it asks for something else."""
    match parts:
        case ["blobs", "datasets", _, _, _, *path]: return "/".join(path)
        case ["datasets", _, _, "resolve", _, *path] if path: return "/".join(path)
        case ["api", *_]: return None
        case ["blobs", _, _, _, *path]: return "/".join(path)
        case [_, _, "resolve", _, *path] if path: return "/".join(path)
    return None


class Listing:
    """Passes a description or a tree on, with what faults put into it."""

    def __init__(self, faults: list[Fault], parts: list[str], send: Any):
        self.faults, self.parts, self.send, self.start, self.body = faults, parts, send, None, b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start": self.start = message
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body"): await self.finish()

    async def finish(self) -> None:
        assert self.start is not None
        if self.start["status"] == 200: self.body = self.spoilt()
        headers = headers_of(self.start) | {"content-length": str(len(self.body))}
        await self.send(with_headers(self.start, headers))
        await self.send({"type": "http.response.body", "body": self.body})

    def spoilt(self) -> bytes:
        match self.parts[4:]:
            case [] | ["revision", _] if len(self.parts) > 3:
                said = json.loads(self.body)
                if fault := take(self.faults, "commit", "info"): said["sha"] = fault.value
                said["siblings"] = self.listed(said["siblings"], "rfilename")
            case ["tree", *_]: said = self.listed(json.loads(self.body), "path")
            case _: return self.body
        return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()  # as the server does

    def listed(self, entries: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        """A listing, with the names and hashes that a fault puts into it."""
        if fault := take(self.faults, "listing", "*"): entries = entries + [entries[0] | {key: fault.value}]
        if not take(self.faults, "no-hash", "*"): return entries
        return [{k: v for k, v in entry.items() if k not in ("lfs", "blobId", "oid")} for entry in entries]


class Cut(Exception): """The connection is to break off here."""


class FileReply:
    """Passes a file on, with what faults do to its headers and to its bytes."""

    def __init__(self, faults: list[Fault], path: str, method: str, send: Any):
        self.faults, self.path, self.method, self.send = faults, path, method, send
        self.replaced, self.sent, self.left = False, 0, None
        self.extra, self.change, self.cut, self.slow = b"", None, None, None

    def take(self, kind: str) -> Fault | None: return take(self.faults, kind, self.path)

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start": await self.start(message)
        elif not self.replaced: await self.body(message)

    async def start(self, message: Any) -> None:
        status = message["status"]
        if status not in (200, 206, 302, 416): return await self.send(message)
        if self.take("html"):
            self.replaced = True
            page = b"<html><body>Please log in to this network</body></html>"
            return await reply(self.send, 200, {"content-type": "text/html; charset=utf-8", "content-length": str(len(page))}, page)
        headers = self.headers(headers_of(message))
        if status in (200, 206): headers = self.body_headers(headers)
        await self.send(with_headers(message, headers))

    def headers(self, headers: dict[str, str]) -> dict[str, str]:
        """What is said about a file."""
        is_linked = "x-linked-etag" in headers
        if fault := self.take("commit"): headers["x-repo-commit"] = fault.value
        if fault := self.take("etag"):
            headers["etag"] = f'"{fault.value}"'
            if is_linked: headers["x-linked-etag"] = headers["etag"]
        if (fault := self.take("size")) and is_linked: headers["x-linked-size"] = str(fault.value)
        return headers

    def body_headers(self, headers: dict[str, str]) -> dict[str, str]:
        """What is said about the bytes that follow; decides what happens to them."""
        self.take("no-range")
        length = int(headers["content-length"])
        span = headers.get("content-range", f"bytes 0-/{length}").removeprefix("bytes ")
        self.offset, size = int(span.split("-")[0]), int(span.split("/")[1])
        if self.take("encoding"): headers["content-encoding"] = "gzip"
        short = self.take("short")
        self.left = min(length, short.value) if short else length
        if self.take("long"): self.extra = b"x" * 100
        if self.take("no-size"):
            headers.pop("x-linked-size", None)
            del headers["content-length"]
        elif self.left < length: del headers["content-length"]
        else: headers["content-length"] = str(length + len(self.extra))
        if self.method == "GET":
            self.change, self.cut, self.slow = self.spoil(size), self.take("cut"), self.take("slow-body")
        return headers

    def spoil(self, size: int) -> Any:
        """A function of (offset, bytes) that returns what is sent instead."""
        flip, zeros = self.take("flip"), self.take("zeros")
        at = flip.value if flip and flip.value is not None else size // 2
        def change(offset: int, piece: bytes) -> bytes:
            if flip and offset <= at < offset + len(piece):
                changed = bytearray(piece)
                changed[at - offset] ^= 1
                piece = bytes(changed)
            if zeros and offset + len(piece) > size // 2:
                keep = max(0, size // 2 - offset)
                piece = piece[:keep] + bytes(len(piece) - keep)
            return piece
        return change

    async def body(self, message: Any) -> None:
        if self.change is None: return await self.send(message)
        piece, more = message.get("body", b"")[:self.left - self.sent], message.get("more_body", False)
        if self.cut and self.sent + len(piece) > self.cut.value: await self.break_off(piece)
        spoilt = self.change(self.offset + self.sent, piece)
        self.sent += len(piece)
        if not more: spoilt += self.extra
        await self.send({"type": "http.response.body", "body": spoilt, "more_body": more})
        if self.slow and piece: await asyncio.sleep(self.slow.value)

    async def break_off(self, piece: bytes) -> None:
        """Send what may still be sent, and end the connection."""
        piece = self.change(self.offset + self.sent, piece[:self.cut.value - self.sent])
        if piece: await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        raise Cut
