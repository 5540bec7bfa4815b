"""The strict S3 of the tests refuses what AWS S3 refuses: each rule refuses its case and lets the right one through."""

import pytest

from support.http1 import Message
from support.server import MI
from support.strict import Refusal, Rules


def request(line: str, body: bytes = b"", **headers: str) -> Message:
    """A request; underscores in the names of headers stand for hyphens."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return Message(f"{line} HTTP/1.1\r\n{lines}\r\n".encode(), body)


def begun(rules: Rules, **headers: str) -> None:
    """An upload with the id U."""
    created = request("POST /b/k?uploads", **headers)
    rules.check(created)
    rules.note(created, Message(b"HTTP/1.1 200 OK\r\n\r\n", b"<UploadId>U</UploadId>"))


def completion(element: bytes = b"") -> Message:
    return request("POST /b/k?uploadId=U", b"<Part><PartNumber>1</PartNumber>" + element + b"</Part>")


NVME = {"x_amz_checksum_algorithm": "CRC64NVME", "x_amz_checksum_type": "FULL_OBJECT"}
CRC32C = {"x_amz_checksum_algorithm": "CRC32C"}
PART = "PUT /b/k?partNumber=1&uploadId=U"

REFUSED = {
    "a checksum with a part of an upload that names none": ({}, {}, request(PART, x_amz_checksum_crc32="AAAA=")),
    "another checksum than the upload's": ({}, NVME, request(PART, x_amz_checksum_crc32="AAAA=")),
    "a part without the upload's checksum": ({}, NVME, request(PART)),
    "a composite upload completed without the parts' values": ({}, CRC32C, completion(b"<ETag>e</ETag>")),
    "a completion with another algorithm's values": ({}, NVME, completion(b"<ChecksumCRC32>x</ChecksumCRC32>")),
    "part 10001": ({}, {}, request("PUT /b/k?partNumber=10001&uploadId=U")),
    "a range of a small object": ({}, {}, request(PART, x_amz_copy_source="/b/o", x_amz_copy_source_range="bytes=0-4095")),
    "CRC64NVME of parts": ({}, {}, request("POST /b/k?uploads", x_amz_checksum_algorithm="CRC64NVME", x_amz_checksum_type="COMPOSITE")),
    "a type without an algorithm": ({}, {}, request("POST /b/k?uploads", x_amz_checksum_type="FULL_OBJECT")),
    "a condition on a part": ({}, {}, request(PART, if_none_match="*")),
    "a condition other than * of a creation": ({}, {}, request("PUT /b/k", if_none_match='"etag"')),
    "a deletion of many without a checksum": ({}, {}, request("POST /b?delete")),
    "a directory bucket's condition on a deletion": ({}, {}, request("DELETE /b/k", x_amz_if_match_size="1")),
    "object lock and no checksum": ({"locked": True}, {}, request("PUT /b/k")),
    "an address of another region": ({"region": "eu-central-1", "elsewhere": True}, {}, request("GET /b/k")),
    "another region": ({"region": "eu-central-1"}, {}, request("GET /b/k", authorization="AWS4 Credential=A/20260101/us-east-1/s3/aws4_request")),
    "a header that the store does not know": ({"unknown": "x-amz-checksum-.*"}, {}, request("PUT /b/k", x_amz_checksum_crc32="AAAA=")),
}


CODES = {
    "a part without the upload's checksum": (400, "InvalidRequest"),
    "an address of another region": (301, "PermanentRedirect"),
    "another region": (400, "AuthorizationHeaderMalformed"),
    "a condition on a part": (501, "NotImplemented"),
}
"""Status and code of some, as S3's list of errors has them."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_s3_refuses_is_refused(case):
    rules, upload, wrong = REFUSED[case]
    rules = Rules(**rules)
    if "uploadId" in wrong.line:
        begun(rules, **upload)
    with pytest.raises(Refusal) as refused:
        rules.check(wrong)
    if case in CODES:
        assert (refused.value.status, refused.value.code) == CODES[case]
    if "region" in case:
        assert refused.value.headers == {"x-amz-bucket-region": "eu-central-1"}


def part(number: int, length: int, **headers: str) -> Message:
    body = b"" if "x_amz_copy_source" in headers else bytes(length)
    return request(f"PUT /b/k?partNumber={number}&uploadId=U", body, **headers)


@pytest.mark.parametrize("how", ["sent", "in chunks", "copied"])
@pytest.mark.parametrize(
    ("lengths", "is_taken"),
    [
        ((5 * MI, 5 * MI, 1), True),
        ((1,), True),
        ((5 * MI - 1, 5 * MI), False),
        ((5 * MI, 1, 5 * MI), False),
    ],
)
def test_parts_but_the_last_have_five_mebibytes(lengths, is_taken, how):
    rules = Rules()
    begun(rules)
    for number, length in enumerate(lengths, 1):
        headers = {
            "in chunks": {"x_amz_decoded_content_length": str(length)},
            "copied": {"x_amz_copy_source": "/b/other", "x_amz_copy_source_range": f"bytes=7-{6 + length}"},
        }.get(how, {})
        # Chunks have lines between them, which are no data.
        sent = part(number, length + 100 * (how == "in chunks"), **headers)
        rules.check(sent)
        rules.note(sent, Message(b"HTTP/1.1 200 OK\r\n\r\n", b""))
    numbers = "".join(f"<Part><PartNumber>{number}</PartNumber></Part>" for number in range(1, len(lengths) + 1))
    done = request("POST /b/k?uploadId=U", numbers.encode())
    if is_taken:
        rules.check(done)
        return
    with pytest.raises(Refusal) as refused:
        rules.check(done)
    assert (refused.value.status, refused.value.code) == (400, "EntityTooSmall")


@pytest.mark.parametrize("line", ["PUT /b/k", "POST /b/k?uploadId=U"])
def test_of_conditional_writes_to_one_key_at_once_one_goes_on(line):
    rules = Rules()
    first, second = request(line, if_none_match="*"), request("PUT /b/k", if_match='"etag"')
    under_way = rules.begin(first)
    with pytest.raises(Refusal) as refused:
        rules.begin(second)
    assert (refused.value.status, refused.value.code) == (409, "ConditionalRequestConflict")
    for other in (request("PUT /b/k"), request("GET /b/k", if_none_match="*")):
        assert rules.begin(other) is None, "it has no condition, or writes nothing"
    rules.begin(request("PUT /b/other", if_none_match="*"))
    rules.end(under_way)
    rules.end(rules.begin(second))


def test_what_s3_takes_is_taken():
    rules = Rules(locked=True, region="eu-central-1")
    begun(rules, **NVME)
    rules.check(request(PART, x_amz_checksum_crc64nvme="AAAAAAAAAAA="))
    rules.check(completion(b"<ChecksumCRC64NVME>AAAAAAAAAAA=</ChecksumCRC64NVME>"))
    rules.check(completion(b"<ETag>e</ETag>"))
    rules.check(request("PUT /b/k", if_none_match="*", content_md5="x"))
    rules.check(request("PUT /b/k", if_match='"etag"', x_amz_trailer="x-amz-checksum-crc32"))
    rules.check(request("POST /b?delete", content_md5="x"))
    rules.check(request("DELETE /b/k", if_match='"etag"'))
    rules.check(request("GET /b/k", authorization="AWS4 Credential=A/20260101/eu-central-1/s3/aws4_request"))


def test_the_first_requests_to_a_key_are_slowed_down():
    rules = Rules(slow_down=2)
    for _ in range(2):
        with pytest.raises(Refusal):
            rules.check(request("GET /b/k"))
    rules.check(request("GET /b/k"))
