//! The kernel's NBD driver, by generic netlink (linux/nbd-netlink.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

use crate::nbd::wire::part;

const NLMSG_ERROR: u16 = 2;
const REQUEST_AND_ACK: u16 = 1 | 4;
const HEADER_BYTES: usize = 16;
const GENERIC_HEADER_BYTES: usize = 4;
const NESTED: u16 = 1 << 15;

const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// Nothing that this module asks for is answered with more.
const ANSWER_BYTES: usize = 16 << 10;

/// A device to be made. There is no command timeout: the relay answers what the server has not answered yet never too late.
/// There is no dead-connection timeout either: the socket dies with the relay alone.
pub(crate) struct Device<'a> {
    pub(crate) index: Option<u32>,
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    pub(crate) flags: u16,
    pub(crate) backend: &'a str,
}

/// The driver.
pub(crate) struct Driver {
    socket: OwnedFd,
    family: u16,
}

impl Driver {
    /// Finds it. The error is `NotFound` where the kernel has none.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(GENERIC),
        )?;
        let driver = Self {
            socket,
            family: CONTROLLER,
        };
        let mut message = Message::new(CONTROLLER, GET_FAMILY, 1);
        message.put(FAMILY_NAME, b"nbd\0");
        let found = driver.ask(message)?;
        let family = found.as_deref().and_then(|found| attribute(found, FAMILY_ID));
        let family = family.and_then(|id| id.get(..2)).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            family: u16::from_ne_bytes(part(family, 0)),
            ..driver
        })
    }

    /// Makes a device that speaks through the socket, and says which it is.
    pub(crate) fn connect(&self, device: &Device<'_>, socket: BorrowedFd<'_>) -> io::Result<u32> {
        let mut message = Message::new(self.family, CONNECT, 1);
        if let Some(index) = device.index {
            message.put(INDEX, &index.to_ne_bytes());
        }
        message.put(SIZE_BYTES, &device.size.to_ne_bytes());
        message.put(BLOCK_SIZE_BYTES, &device.block_size.to_ne_bytes());
        message.put(SERVER_FLAGS, &u64::from(device.flags).to_ne_bytes());
        message.put(BACKEND_IDENTIFIER, &[device.backend.as_bytes(), b"\0"].concat());
        let descriptor = nested(
            SOCKET_ITEM,
            &encoded(SOCKET_FD, &socket.as_raw_fd().to_ne_bytes()),
        );
        message.bytes.extend(nested(SOCKETS, &descriptor));
        let answer = self.ask(message)?;
        let index = answer
            .as_deref()
            .and_then(|answer| attribute(answer, INDEX)?.get(..4));
        let index = index
            .map(|index| u32::from_ne_bytes(part(index, 0)))
            .or(device.index);
        index.ok_or_else(|| io::Error::other("it does not say which device it made"))
    }

    /// Takes a device away, whatever it does.
    pub(crate) fn disconnect(&self, index: u32) -> io::Result<()> {
        let mut message = Message::new(self.family, DISCONNECT, 1);
        message.put(INDEX, &index.to_ne_bytes());
        self.ask(message).map(drop)
    }

    /// Gives a device another size; `backend` is what it was made with, without which the kernel takes it for somebody else's. This may
    /// take as long as what is under way on the device.
    pub(crate) fn resize(&self, index: u32, size: u64, backend: &str) -> io::Result<()> {
        self.ask(resizing(self.family, index, size, backend)).map(drop)
    }

    /// Sends a message and waits until the kernel has said how it went; gives the attributes of its answer, if there was one.
    fn ask(&self, message: Message) -> io::Result<Option<Vec<u8>>> {
        sendto(
            &self.socket,
            &message.finish(),
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = None;
        loop {
            let mut buffer = vec![0; ANSWER_BYTES];
            let (got, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..got];
            while rest.len() >= HEADER_BYTES {
                let length = (u32::from_ne_bytes(part(rest, 0)) as usize).clamp(HEADER_BYTES, rest.len());
                let (message, after) = rest.split_at(length);
                rest = after
                    .get(length.next_multiple_of(4) - length..)
                    .unwrap_or_default();
                let body = &message[HEADER_BYTES..];
                if u16::from_ne_bytes(part(message, 4)) != NLMSG_ERROR {
                    answer = body.get(GENERIC_HEADER_BYTES..).map(<[u8]>::to_vec);
                } else if body.len() >= 4 {
                    return match i32::from_ne_bytes(part(body, 0)) {
                        0 => Ok(answer),
                        error => Err(io::Error::from_raw_os_error(-error)),
                    };
                }
            }
        }
    }
}

fn resizing(family: u16, index: u32, size: u64, backend: &str) -> Message {
    let mut message = Message::new(family, RECONFIGURE, 1);
    message.put(INDEX, &index.to_ne_bytes());
    message.put(SIZE_BYTES, &size.to_ne_bytes());
    message.put(BACKEND_IDENTIFIER, &[backend.as_bytes(), b"\0"].concat());
    message
}

/// A message under construction.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(family: u16, command: u8, version: u8) -> Self {
        let mut bytes = vec![0; HEADER_BYTES + GENERIC_HEADER_BYTES];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        (bytes[HEADER_BYTES], bytes[HEADER_BYTES + 1]) = (command, version);
        Self { bytes }
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend(encoded(kind, value));
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

fn encoded(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[u8]) -> Vec<u8> {
    encoded(kind | NESTED, attributes)
}

/// The value of the first attribute of a kind.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let length = (u16::from_ne_bytes(part(attributes, 0)) as usize).clamp(4, attributes.len());
        let (one, after) = attributes.split_at(length);
        if u16::from_ne_bytes(part(one, 2)) & !NESTED == kind {
            return Some(&one[4..]);
        }
        attributes = after.get(length.next_multiple_of(4) - length..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let mut bytes = encoded(2, b"nbd\0");
        bytes.extend(encoded(7, &[1]));
        bytes.extend(nested(1, &encoded(1, &5_u32.to_ne_bytes())));
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(attribute(&bytes, 7), Some(&[1][..]));
        assert_eq!(
            attribute(attribute(&bytes, 1).unwrap(), 1),
            Some(&5_u32.to_ne_bytes()[..])
        );
        assert_eq!(attribute(&bytes, 3), None);
        assert_eq!(attribute(&[0, 0, 0, 0, 1], 3), None);
    }

    /// The numbers that a header gives to the names of its enumerations, each of which counts from 0.
    fn numbers(header: &str) -> std::collections::BTreeMap<&str, u16> {
        header
            .split("enum {")
            .skip(1)
            .filter_map(|rest| rest.split('}').next())
            .flat_map(|names| names.split(',').map(str::trim).zip(0..))
            .collect()
    }

    #[test]
    fn commands_and_attributes_have_the_numbers_of_the_kernels_header() {
        // It comes with every C library; without it there is nothing to compare with.
        let Ok(header) = std::fs::read_to_string("/usr/include/linux/nbd-netlink.h") else {
            return;
        };
        let numbers = numbers(&header);
        for (name, number) in [
            ("NBD_CMD_CONNECT", CONNECT.into()),
            ("NBD_CMD_DISCONNECT", DISCONNECT.into()),
            ("NBD_CMD_RECONFIGURE", RECONFIGURE.into()),
            ("NBD_ATTR_INDEX", INDEX),
            ("NBD_ATTR_SIZE_BYTES", SIZE_BYTES),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", BLOCK_SIZE_BYTES),
            ("NBD_ATTR_SERVER_FLAGS", SERVER_FLAGS),
            ("NBD_ATTR_SOCKETS", SOCKETS),
            ("NBD_ATTR_BACKEND_IDENTIFIER", BACKEND_IDENTIFIER),
            ("NBD_SOCK_ITEM", SOCKET_ITEM),
            ("NBD_SOCK_FD", SOCKET_FD),
        ] {
            assert_eq!(numbers.get(name), Some(&number), "{name}");
        }
    }

    /// Neither sockets nor a block size, which the kernel would change, too.
    #[test]
    fn a_device_is_resized_by_its_number_and_what_it_was_made_with() {
        let bytes = resizing(0x1234, 7, 3 << 40, "nbd://h").finish();
        assert_eq!(bytes.len(), u32::from_ne_bytes(part(&bytes, 0)) as usize);
        assert_eq!(u16::from_ne_bytes(part(&bytes, 4)), 0x1234);
        assert_eq!(u16::from_ne_bytes(part(&bytes, 6)), REQUEST_AND_ACK);
        let (header, mut rest) = bytes.split_at(HEADER_BYTES + GENERIC_HEADER_BYTES);
        assert_eq!(header[HEADER_BYTES..], [3, 1, 0, 0]);
        assert_eq!(attribute(rest, 1), Some(&7_u32.to_ne_bytes()[..]));
        assert_eq!(attribute(rest, 2), Some(&(3_u64 << 40).to_ne_bytes()[..]));
        assert_eq!(attribute(rest, 10), Some(&b"nbd://h\0"[..]));
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            kinds.push(u16::from_ne_bytes(part(rest, 2)));
            let length = usize::from(u16::from_ne_bytes(part(rest, 0)));
            rest = &rest[length.next_multiple_of(4)..];
        }
        assert_eq!(kinds, [1, 2, 10]);
    }

    #[test]
    fn the_kernel_is_asked_for_a_family() {
        // No NBD driver here, mostly; an answer either way shows that the message is one.
        match Driver::open() {
            Ok(driver) => assert!(driver.family > CONTROLLER),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}"),
        }
    }
}
