"""The strict S3 of the tests refuses what AWS S3 refuses: each rule refuses its case and lets the right one through."""

import pytest

from support.http1 import Message
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
    "CRC64NVME of parts": ({}, {}, request("POST /b/k?uploads", x_amz_checksum_algorithm="CRC64NVME", x_amz_checksum_type="COMPOSITE")),
    "a type without an algorithm": ({}, {}, request("POST /b/k?uploads", x_amz_checksum_type="FULL_OBJECT")),
    "a condition on a part": ({}, {}, request(PART, if_none_match="*")),
    "a condition other than * of a creation": ({}, {}, request("PUT /b/k", if_none_match='"etag"')),
    "a deletion of many without a checksum": ({}, {}, request("POST /b?delete")),
    "a directory bucket's condition on a deletion": ({}, {}, request("DELETE /b/k", x_amz_if_match_size="1")),
    "object lock and no checksum": ({"locked": True}, {}, request("PUT /b/k")),
    "another region": ({"region": "eu-central-1"}, {}, request("GET /b/k", authorization="AWS4 Credential=A/20260101/us-east-1/s3/aws4_request")),
    "a header that the store does not know": ({"unknown": "x-amz-checksum-.*"}, {}, request("PUT /b/k", x_amz_checksum_crc32="AAAA=")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_s3_refuses_is_refused(case):
    rules, upload, wrong = REFUSED[case]
    rules = Rules(**rules)
    if "uploadId" in wrong.line:
        begun(rules, **upload)
    with pytest.raises(Refusal):
        rules.check(wrong)


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
