//! Which S3 requests pass on a connection, read off the bytes a client sends. Pure: bytes in, kinds out.
//!
//! HTTP/1.1 as S3 clients speak it: heads, bodies of a stated length, chunked bodies. Bodies are skipped unread. A
//! connection that cannot be followed is given up and reported once as [`Kind::Unreadable`], so that a count is
//! never silently too small.

/// What a request asks of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An object, or a range of one.
    Get,
    /// A list of objects, uploads or buckets.
    List,
    /// The properties of an object or bucket.
    Head,
    /// A whole object.
    Put,
    /// One part of an upload in parts.
    Part,
    /// The beginning of an upload in parts.
    BeginParts,
    /// The end of an upload in parts.
    EndParts,
    /// The removal of objects, or of an upload in parts.
    Delete,
    /// Any other method.
    Other,
    /// Not a request: from here on this connection is not counted.
    Unreadable,
}

impl Kind {
    /// Every kind, in the order of the enum.
    pub const ALL: [Kind; 10] = [
        Kind::Get,
        Kind::List,
        Kind::Head,
        Kind::Put,
        Kind::Part,
        Kind::BeginParts,
        Kind::EndParts,
        Kind::Delete,
        Kind::Other,
        Kind::Unreadable,
    ];

    /// The kind's name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Get => "get",
            Kind::List => "list",
            Kind::Head => "head",
            Kind::Put => "put",
            Kind::Part => "part",
            Kind::BeginParts => "begin_parts",
            Kind::EndParts => "end_parts",
            Kind::Delete => "delete",
            Kind::Other => "other",
            Kind::Unreadable => "unreadable",
        }
    }

    /// The kind of a request, from its method and its target (path and query).
    fn of(method: &str, target: &str) -> Kind {
        let query = target.split_once('?').map_or("", |(_, query)| query);
        let has = |key: &str| {
            query
                .split('&')
                .any(|pair| pair.split_once('=').map_or(pair, |(name, _)| name) == key)
        };
        match method {
            "GET" if has("list-type") || has("uploads") || has("delimiter") || has("prefix") => Kind::List,
            "GET" => Kind::Get,
            "HEAD" => Kind::Head,
            "PUT" if has("partNumber") => Kind::Part,
            "PUT" => Kind::Put,
            "POST" if has("uploads") => Kind::BeginParts,
            "POST" if has("uploadId") => Kind::EndParts,
            "POST" if has("delete") => Kind::Delete,
            "DELETE" => Kind::Delete,
            _ => Kind::Other,
        }
    }
}

/// Longest head or chunk line that is taken for one.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// Follows the requests of one connection.
#[derive(Debug, Default)]
pub struct Requests {
    place: Place,
    /// The head or chunk line that has begun, without its end.
    text: Vec<u8>,
}

/// Where in a request the next byte belongs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Head,
    /// A body of stated length; the bytes still to come.
    Body(u64),
    ChunkSize,
    /// A chunk and the line end after it; the bytes still to come.
    Chunk(u64),
    /// The lines after the last chunk.
    Trailer,
    GivenUp,
}

impl Requests {
    /// Takes the next bytes of the connection and calls `seen` for each request whose head they complete.
    pub fn feed(&mut self, mut bytes: &[u8], mut seen: impl FnMut(Kind)) {
        while !bytes.is_empty() {
            match self.place {
                Place::Body(left) => self.place = after(skip(&mut bytes, left), Place::Body, Place::Head),
                Place::Chunk(left) => {
                    self.place = after(skip(&mut bytes, left), Place::Chunk, Place::ChunkSize)
                }
                Place::Head => {
                    if let Some(head) = self.take_text(&mut bytes, b"\r\n\r\n") {
                        let (kind, place) = read_head(&head);
                        self.place = place;
                        seen(kind);
                    }
                }
                Place::ChunkSize => {
                    if let Some(line) = self.take_text(&mut bytes, b"\r\n") {
                        self.place = match read_chunk_size(&line) {
                            Some(0) => Place::Trailer,
                            Some(len_bytes) => Place::Chunk(len_bytes.saturating_add(2)),
                            None => Place::GivenUp,
                        };
                    }
                }
                Place::Trailer => {
                    if self
                        .take_text(&mut bytes, b"\r\n")
                        .is_some_and(|line| line.is_empty())
                    {
                        self.place = Place::Head;
                    }
                }
                Place::GivenUp => return,
            }
            if self.text.len() > HEAD_MAX_BYTES {
                self.place = Place::GivenUp;
                self.text = Vec::new();
            }
            if self.place == Place::GivenUp {
                seen(Kind::Unreadable);
                return;
            }
        }
    }

    /// Moves bytes to the text until it ends with `end`; then returns it without that.
    fn take_text(&mut self, bytes: &mut &[u8], end: &[u8]) -> Option<String> {
        while let Some((&byte, rest)) = bytes.split_first() {
            *bytes = rest;
            self.text.push(byte);
            if self.text.ends_with(end) {
                self.text.truncate(self.text.len() - end.len());
                let text = String::from_utf8_lossy(&self.text).into_owned();
                self.text.clear();
                return Some(text);
            }
            if self.text.len() > HEAD_MAX_BYTES {
                return None;
            }
        }
        None
    }
}

/// Drops up to `left` bytes; returns how many are still to come.
fn skip(bytes: &mut &[u8], left: u64) -> u64 {
    let here = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
    *bytes = &bytes[here..];
    left - here as u64
}

fn after(left: u64, more: impl Fn(u64) -> Place, next: Place) -> Place {
    if left == 0 { next } else { more(left) }
}

/// The kind of a request and where its body begins.
fn read_head(head: &str) -> (Kind, Place) {
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or("").split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1")) = (words.next(), words.next(), words.next()) else {
        return (Kind::Other, Place::GivenUp);
    };
    let mut place = Place::Head;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
            place = Place::ChunkSize;
            break;
        }
        if name.eq_ignore_ascii_case("content-length") {
            place = match value.parse() {
                Ok(0) => Place::Head,
                Ok(len_bytes) => Place::Body(len_bytes),
                Err(_) => Place::GivenUp,
            };
        }
    }
    (Kind::of(method, target), place)
}

fn read_chunk_size(line: &str) -> Option<u64> {
    let digits = line.split(';').next().unwrap_or("").trim();
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kinds seen when the bytes come in pieces of `piece_bytes`.
    fn kinds(bytes: &[u8], piece_bytes: usize) -> Vec<Kind> {
        let (mut requests, mut kinds) = (Requests::default(), Vec::new());
        for piece in bytes.chunks(piece_bytes) {
            requests.feed(piece, |kind| kinds.push(kind));
        }
        kinds
    }

    const CONNECTION: &[u8] =
        b"PUT /b/k?x-id=PutObject HTTP/1.1\r\nContent-Length: 26\r\n\r\nGET /b/none HTTP/1.1\r\n\r\n..\
        GET /b/k?x-id=GetObject HTTP/1.1\r\nrange: bytes=0-9\r\n\r\n\
        PUT /b/k?partNumber=1&uploadId=a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n\
        5;sig=x\r\nGET /\r\n0\r\ntrailer: 1\r\n\r\n\
        POST /b/k?uploads HTTP/1.1\r\ncontent-length: 0\r\n\r\n\
        POST /b/k?uploadId=a HTTP/1.1\r\ncontent-length: 2\r\n\r\n<>\
        HEAD /b/ HTTP/1.1\r\n\r\n\
        GET /b/?list-type=2&prefix=a HTTP/1.1\r\n\r\n\
        POST /b/?delete HTTP/1.1\r\ncontent-length: 1\r\n\r\n.\
        DELETE /b/k?x-id=DeleteObject HTTP/1.1\r\n\r\n";

    #[test]
    fn every_request_is_seen_once_however_the_bytes_are_cut() {
        let expected = [
            Kind::Put,
            Kind::Get,
            Kind::Part,
            Kind::BeginParts,
            Kind::EndParts,
            Kind::Head,
            Kind::List,
            Kind::Delete,
            Kind::Delete,
        ];
        for piece_bytes in [1, 2, 3, 7, 64, CONNECTION.len()] {
            assert_eq!(
                kinds(CONNECTION, piece_bytes),
                expected,
                "pieces of {piece_bytes}"
            );
        }
    }

    #[test]
    fn a_body_is_never_taken_for_a_request() {
        let body = b"GET /b/k HTTP/1.1\r\n\r\n";
        let mut bytes = format!(
            "PUT /b/k HTTP/1.1\r\ncontent-length: {}\r\n\r\n",
            body.len() * 100
        )
        .into_bytes();
        bytes.extend(body.repeat(100));
        assert_eq!(kinds(&bytes, 10), [Kind::Put]);
    }

    #[test]
    fn what_is_not_http_is_reported_once() {
        assert_eq!(
            kinds(b"hello\r\n\r\nhello\r\n\r\n", 5),
            [Kind::Other, Kind::Unreadable]
        );
        assert_eq!(kinds(&[b'x'; 200_000], 1000), [Kind::Unreadable]);
        let bad_length = b"PUT /b/k HTTP/1.1\r\ncontent-length: many\r\n\r\n";
        assert_eq!(kinds(bad_length, 100), [Kind::Put, Kind::Unreadable]);
    }

    #[test]
    fn every_kind_has_its_own_name() {
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place);
            let same = Kind::ALL.into_iter().filter(|other| other.name() == kind.name());
            assert_eq!(same.count(), 1, "{}", kind.name());
        }
    }
}
