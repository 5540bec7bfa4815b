"""A proxy before an S3 server that refuses what AWS S3 documents as refused, where MinIO is more lenient.

`Rules` decides, request by request, without sockets. Sources: the S3 API reference (CreateMultipartUpload, UploadPart,
UploadPartCopy, CompleteMultipartUpload, PutObject, DeleteObject, DeleteObjects), and the user guide's pages on checking object integrity,
conditional requests and object lock.
"""

import datetime
import re
import ssl
import threading
from urllib.parse import parse_qs, unquote, urlsplit

from support.http1 import Message, Stream, s3_error
from support.proxy import Proxy

ALGORITHMS = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")
PARTS_MAX = 10_000
PART_LEAST_BYTES = 5 << 20
CONDITIONS = ("if-match", "if-none-match")
ONLY_OF_DIRECTORY_BUCKETS = ("x-amz-if-match-size", "x-amz-if-match-last-modified-time")


class Refusal(Exception):
    """An answer of S3 that is no success."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def checksums_of(request: Message) -> set[str]:
    """The algorithms of which a request carries a value, in a header or behind its body."""
    found = {name for name in ALGORITHMS if request.header(f"x-amz-checksum-{name}")}
    trailer = request.header("x-amz-trailer") or ""
    return found | {name for name in ALGORITHMS if f"x-amz-checksum-{name}" in trailer.lower().split(",")}


def part_bytes(request: Message) -> int | None:
    """The length of the data of an UploadPart, or of an UploadPartCopy if it says which range."""
    if request.header("x-amz-copy-source"):
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.header("x-amz-copy-source-range") or "")
        return int(span[2]) - int(span[1]) + 1 if span else None
    return int(request.header("x-amz-decoded-content-length") or len(request.body))


class Rules:
    """What S3 refuses. `locked`: object lock by default in the bucket. `region`: the bucket's. `elsewhere`: the address is one
    of another region than the bucket's `region`, whatever requests are signed for. `unknown`: headers that the store does not
    know and refuses, as some stores do. `slow_down`: how many of the first requests to a key are refused."""

    def __init__(self, locked=False, region: str | None = None, elsewhere=False, unknown: str | None = None, slow_down=0):
        self.locked, self.region, self.elsewhere, self.slow_down = locked, region, elsewhere, slow_down
        self.unknown = re.compile(unknown) if unknown else None
        self.uploads: dict[str, tuple[str | None, str | None]] = {}
        # Length of the data of each part, by upload and number.
        self.parts: dict[str, dict[int, int | None]] = {}
        self.slowed: dict[str, int] = {}
        # Keys that a conditional write is under way to.
        self.contended: set[str] = set()

    def check(self, request: Message) -> None:
        """Raises the refusal of a request that S3 does not take."""
        method, target, _ = request.line.split(" ")
        query = parse_qs(urlsplit(target).query, keep_blank_values=True)
        path = unquote(urlsplit(target).path)
        self._headers(request)
        self._overload(method, path)
        if method == "PUT" and "partNumber" in query:
            self._no_conditions(request)
            # Whose source is larger begins with more.
            span = re.fullmatch(r"bytes=0-(\d+)", request.header("x-amz-copy-source-range") or "")
            if span and int(span[1]) + 1 < PART_LEAST_BYTES:
                message = "The specified copy source is not supported as a byte-range copy source"
                raise Refusal(400, "InvalidRequest", message)
            self._part(request, int(query["partNumber"][0]), query["uploadId"][0])
        elif method == "PUT":
            if (request.header("if-none-match") or "*") != "*":
                raise Refusal(501, "NotImplemented", "If-None-Match takes * alone")
            self._lock(request)
        elif method == "POST" and "uploads" in query:
            self._no_conditions(request)
            self._creation(request)
        elif method == "POST" and "uploadId" in query:
            self._completion(request, query["uploadId"][0])
        elif method == "POST" and "delete" in query:
            self._no_conditions(request)
            if not (request.header("content-md5") or checksums_of(request)):
                message = "Missing required header for this request: Content-MD5 OR x-amz-checksum-*"
                raise Refusal(400, "InvalidRequest", message)
        elif method == "DELETE":
            for name in ONLY_OF_DIRECTORY_BUCKETS:
                if request.header(name):
                    raise Refusal(501, "NotImplemented", f"{name} is of directory buckets")

    def begin(self, request: Message) -> str | None:
        """A write goes to the server: the key, for `end`, if it has a condition. Of those to one key at the same time the others
        are refused."""
        method, target, _ = request.line.split(" ")
        is_completion = method == "POST" and "uploadId=" in target
        if not (method == "PUT" or is_completion) or not any(request.header(name) for name in CONDITIONS):
            return None
        key = urlsplit(target).path
        if key in self.contended:
            message = "The conditional request cannot succeed due to a conflicting operation"
            raise Refusal(409, "ConditionalRequestConflict", message)
        self.contended.add(key)
        return key

    def end(self, key: str | None) -> None:
        """The write has been answered."""
        self.contended.discard(key)

    def note(self, request: Message, answer: Message) -> None:
        """Learns of an upload that the server has begun, and of a part that it has taken."""
        method, target, _ = request.line.split(" ")
        query = parse_qs(urlsplit(target).query)
        if method == "PUT" and "partNumber" in query and re.match(r"HTTP/1.1 200 ", answer.line):
            self.parts.setdefault(query["uploadId"][0], {})[int(query["partNumber"][0])] = part_bytes(request)
        if request.line.startswith("POST") and (found := re.search(rb"<UploadId>(.*?)</UploadId>", answer.body)):
            algorithm = (request.header("x-amz-checksum-algorithm") or "").lower() or None
            default = {"crc64nvme": "FULL_OBJECT", None: None}.get(algorithm, "COMPOSITE")
            kind = request.header("x-amz-checksum-type") or default
            if b"<CompleteMultipartUploadResult" not in answer.body:
                self.uploads[found[1].decode()] = (algorithm, kind)

    def _headers(self, request: Message) -> None:
        for line in request.head.split(b"\r\n")[1:]:
            name = line.split(b":", 1)[0].decode().lower()
            if self.unknown and name and self.unknown.fullmatch(name):
                raise Refusal(400, "InvalidArgument", f"unsupported header {name}")
        scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", request.header("authorization") or "")
        if self.region and self.elsewhere:
            message = "The bucket you are attempting to access must be addressed using the specified endpoint."
            raise Refusal(301, "PermanentRedirect", message, {"x-amz-bucket-region": self.region})
        if self.region and scope and scope[1] != self.region:
            message = f"The authorization header is malformed; the region '{scope[1]}' is wrong; expecting '{self.region}'"
            raise Refusal(400, "AuthorizationHeaderMalformed", message, {"x-amz-bucket-region": self.region})

    def _overload(self, method: str, path: str) -> None:
        key = f"{method} {path}"
        if self.slowed.setdefault(key, 0) < self.slow_down:
            self.slowed[key] += 1
            raise Refusal(503, "SlowDown", "Please reduce your request rate.")

    def _no_conditions(self, request: Message) -> None:
        for name in CONDITIONS:
            if request.header(name):
                message = f"A header you provided implies functionality that is not implemented: {name}"
                raise Refusal(501, "NotImplemented", message)

    def _lock(self, request: Message) -> None:
        if self.locked and not (request.header("content-md5") or checksums_of(request)):
            message = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests "
            message += "with Object Lock parameters"
            raise Refusal(400, "InvalidRequest", message)

    def _creation(self, request: Message) -> None:
        algorithm = (request.header("x-amz-checksum-algorithm") or "").lower()
        kind = request.header("x-amz-checksum-type")
        if kind and not algorithm:
            message = "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header."
            raise Refusal(400, "InvalidRequest", message)
        if algorithm and algorithm not in ALGORITHMS:
            raise Refusal(400, "InvalidRequest", "Checksum algorithm provided is unsupported.")
        if (algorithm == "crc64nvme" and kind == "COMPOSITE") or (algorithm.startswith("sha") and kind == "FULL_OBJECT"):
            message = f"The {kind} checksum type cannot be used with the {algorithm} checksum algorithm."
            raise Refusal(400, "InvalidRequest", message)

    def _part(self, request: Message, number: int, upload_id: str) -> None:
        if not 1 <= number <= PARTS_MAX:
            raise Refusal(400, "InvalidArgument", "Part number must be an integer between 1 and 10000, inclusive")
        if request.header("x-amz-copy-source"):
            return  # S3 makes the checksum of what it copies
        self._lock(request)
        algorithm, _ = self.uploads.get(upload_id, (None, None))
        sent = checksums_of(request)
        if sent - {algorithm} or (algorithm and not sent):
            actual = next(iter(sent - {algorithm}), "null")
            message = "Checksum Type mismatch occurred, "
            message += f"expected checksum Type: {algorithm or 'null'}, actual checksum Type: {actual}"
            raise Refusal(400, "InvalidRequest", message)

    def _completion(self, request: Message, upload_id: str) -> None:
        algorithm, kind = self.uploads.get(upload_id, (None, None))
        parts = re.findall(rb"<Part>(.*?)</Part>", request.body, re.DOTALL)
        if len(parts) > PARTS_MAX:
            raise Refusal(400, "MalformedXML", "The XML you provided was not well-formed")
        for part in parts:
            named = {name.decode().lower() for name in re.findall(rb"<Checksum(\w+)>", part)}
            if named - {algorithm}:
                raise Refusal(400, "InvalidPart", "One or more of the specified parts could not be found")
            if kind == "COMPOSITE" and not named:
                message = f"The upload was created using a {algorithm} checksum. "
                message += "The complete request must include the checksum for each part."
                raise Refusal(400, "InvalidRequest", message)
        numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", request.body)]
        known = self.parts.get(upload_id, {})
        for number in numbers[:-1]:
            length = known.get(number)
            if length is not None and length < PART_LEAST_BYTES:
                message = "Your proposed upload is smaller than the minimum allowed size"
                raise Refusal(400, "EntityTooSmall", message)


class StrictProxy(Proxy):
    """Forwards to `endpoint` what the rules let through. With `tls`, a certificate and its key, over https."""

    def __init__(self, endpoint: str, rules: Rules | None = None, tls: tuple[str, str] | None = None):
        self.rules = rules or Rules()
        # Uploads that have neither been completed nor aborted, by id, and how long ago they are said to have begun.
        self.unfinished: dict[str, str] = {}
        self.unfinished_age_s = 0
        # Requests that hang, by a pattern of their lines, and whether one does.
        self.hangs: re.Pattern | None = None
        self.is_hanging = threading.Event()
        self.refusals: list[str] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.context = None
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(*tls)
        super().__init__(endpoint)
        if tls:
            self.endpoint = self.endpoint.replace("http://", "https://")

    def take_broken(self) -> list[str]:
        """The refusals since the last call that a client must not give cause for; races are none."""
        with self.lock:
            taken, self.refusals = self.refusals, []
            self.requests = []
        return [refusal for refusal in taken if not refusal.startswith("ConditionalRequestConflict")]

    def serve(self, client, server) -> None:
        if self.context:
            client = self.context.wrap_socket(client, server_side=True)
        requests, answers = Stream(client), Stream(server)
        while True:
            request = requests.request()
            if self.hangs and self.hangs.search(request.line):
                self.is_hanging.set()
                client.recv(1)  # until the client goes
                return
            try:
                with self.lock:
                    self.requests.append(request.line)
                    self.rules.check(request)
                    conditional = self.rules.begin(request)
            except Refusal as refusal:
                with self.lock:
                    self.refusals.append(f"{refusal.code}: {refusal.message}: {request.line}")
                client.sendall(answer_of(refusal, request))
                continue
            if (listing := self._listing(request)) is not None:
                client.sendall(listing)
                continue
            try:
                answer = answers.exchange(request)
            finally:
                with self.lock:
                    self.rules.end(conditional)
            with self.lock:
                self.rules.note(request, answer)
                self._note_upload(request, answer)
            client.sendall(answer.head + answer.body)

    def _note_upload(self, request: Message, answer: Message) -> None:
        method, target, _ = request.line.split(" ")
        query = parse_qs(urlsplit(target).query, keep_blank_values=True)
        if method == "POST" and "uploads" in query and (found := re.search(rb"<UploadId>(.*?)</UploadId>", answer.body)):
            self.unfinished[found[1].decode()] = unquote(urlsplit(target).path).split("/", 2)[2]
        elif method in ("POST", "DELETE") and "uploadId" in query and re.match(r"HTTP/1.1 20[04] ", answer.line):
            if b"<Error>" not in answer.body:
                self.unfinished.pop(query["uploadId"][0], None)

    def _listing(self, request: Message) -> bytes | None:
        """The answer to ListMultipartUploads: MinIO lists those of one object alone, S3 those below a prefix."""
        method, target, _ = request.line.split(" ")
        query = parse_qs(urlsplit(target).query, keep_blank_values=True)
        if method != "GET" or "uploads" not in query:
            return None
        began = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=self.unfinished_age_s)
        prefix = query.get("prefix", [""])[0]
        with self.lock:
            uploads = "".join(
                f"<Upload><Key>{key}</Key><UploadId>{upload}</UploadId><Initiated>{began:%Y-%m-%dT%H:%M:%S.000Z}</Initiated></Upload>"
                for upload, key in self.unfinished.items()
                if key.startswith(prefix)
            )
        body = f"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{uploads}</ListMultipartUploadsResult>".encode()
        head = f"HTTP/1.1 200 OK\r\nx-amz-request-id: STRICT\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


def answer_of(refusal: Refusal, request: Message) -> bytes:
    """An S3 error, marked as the store's own."""
    headers = {"x-amz-request-id": "STRICT", **refusal.headers}
    return s3_error(refusal.status, refusal.code, refusal.message, request.has_answer_body, headers)
