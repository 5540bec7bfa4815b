//! The fixed newstyle handshake: which export a server offers, and what it says of it.

use std::io::{self, Read, Write};

use crate::nbd::wire::part;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OLD_MAGIC: u64 = 0x0000_4202_8186_1253;
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPT_STARTTLS: u32 = 5;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;
/// What a device wants to know beside the size. Who asks for the sizes of blocks must keep to them.
pub(crate) const FOR_DEVICE: &[u16] = &[INFO_DESCRIPTION, INFO_BLOCK_SIZE];
/// No answer of a server to an option is longer.
const OPTION_REPLY_MAX: u32 = 64 << 10;

/// How the description begins of an export that says which volume it is (src/nbdkit_ext.rs).
const VOLUME: &str = "Hypernbd volume ";

const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
/// What the kernel goes on using once it was offered: flush, FUA, trim, zeroes.
const USED: u16 = SEND_FLUSH | 1 << 3 | 1 << 5 | 1 << 6;

/// What a server says of an export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// The smallest, the best and the largest request, where the server says.
    pub blocks: Option<(u32, u32, u32)>,
    /// What it says of itself to people.
    pub description: String,
}

impl Export {
    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.flags & READ_ONLY != 0
    }

    /// Which volume it is, in the words of our own servers. Descriptions of others are for people, and may change.
    pub(crate) fn volume(&self) -> Option<&str> {
        let id = self.description.strip_prefix(VOLUME)?;
        (!id.is_empty()).then_some(&*self.description)
    }

    pub(crate) fn can_flush(&self) -> bool {
        self.flags & SEND_FLUSH != 0
    }

    /// Why a device that was attached with this export cannot go on with another one.
    pub(crate) fn obstacle(&self, now: &Self) -> Option<String> {
        if let Some(was) = self.volume()
            && now.volume() != Some(was)
        {
            let is = now.volume().unwrap_or("one that does not say which volume it is");
            return Some(format!("the export is {is} now, and was {was}"));
        }
        let least = |export: &Self| export.blocks.map_or(1, |(least, ..)| least);
        if now.size < self.size {
            return Some(format!(
                "the export has {} bytes now, and had {}",
                now.size, self.size
            ));
        }
        if now.is_read_only() != self.is_read_only() {
            let (is, was) = if now.is_read_only() {
                ("read-only", "writable")
            } else {
                ("writable", "read-only")
            };
            return Some(format!("the export is {is} now, and was {was}"));
        }
        let missing = self.flags & USED & !now.flags;
        if missing != 0 {
            return Some(format!(
                "the export lacks what it had: transmission flags {missing:#x}"
            ));
        }
        (least(now) > least(self)).then(|| {
            format!(
                "the export wants blocks of {} bytes now, and took {}",
                least(now),
                least(self)
            )
        })
    }
}

/// Hears the server's greeting, and answers it.
pub(crate) fn greet(socket: &mut (impl Read + Write)) -> io::Result<()> {
    let hello: [u8; 18] = take(socket)?;
    if u64::from_be_bytes(part(&hello, 0)) != MAGIC || u64::from_be_bytes(part(&hello, 8)) != OPTION_MAGIC {
        return Err(io::Error::other("this is no NBD server of the newstyle protocol"));
    }
    let flags = u16::from_be_bytes(part(&hello, 16));
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(io::Error::other(
            "the server does not speak the fixed newstyle protocol",
        ));
    }
    socket.write_all(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())
}

/// Has a server that was greeted begin TLS.
pub(crate) fn start_tls(socket: &mut (impl Read + Write)) -> io::Result<()> {
    let option = [OPT_STARTTLS, 0].map(u32::to_be_bytes).concat();
    socket.write_all(&[&OPTION_MAGIC.to_be_bytes()[..], &option].concat())?;
    match option_reply(socket, OPT_STARTTLS)? {
        (REP_ACK, _) => Ok(()),
        (kind, said) => {
            let said = String::from_utf8_lossy(&said).into_owned();
            Err(io::Error::other(format!(
                "the server does not speak TLS (answer {kind:#x}) {said}"
            )))
        }
    }
}

/// Asks for an export, and for more about it, once the server was greeted. An error tells what the server answered.
pub(crate) fn ask(socket: &mut (impl Read + Write), name: &str, infos: &[u16]) -> io::Result<Export> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(OPT_GO.to_be_bytes());
    message.extend((name.len() as u32 + 4 + 2 + 2 * infos.len() as u32).to_be_bytes());
    message.extend((name.len() as u32).to_be_bytes());
    message.extend(name.as_bytes());
    message.extend((infos.len() as u16).to_be_bytes());
    message.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    socket.write_all(&message)?;

    let mut export = None;
    let mut rest = Export::default();
    loop {
        let (kind, data) = option_reply(socket, OPT_GO)?;
        match (kind, info(&data)) {
            (REP_ACK, _) => break,
            (REP_INFO, Some((INFO_EXPORT, data))) if data.len() == 10 => {
                export = Some((
                    u64::from_be_bytes(part(data, 0)),
                    u16::from_be_bytes(part(data, 8)),
                ));
            }
            (REP_INFO, Some((INFO_DESCRIPTION, data))) => {
                rest.description = String::from_utf8_lossy(data).into_owned();
            }
            (REP_INFO, Some((INFO_BLOCK_SIZE, data))) if data.len() == 12 => {
                let at = |at| u32::from_be_bytes(part(data, at));
                rest.blocks = Some((at(0), at(4), at(8)));
            }
            (kind, _) if kind & REP_ERR != 0 => {
                return Err(io::Error::other(refusal(
                    kind,
                    name,
                    &String::from_utf8_lossy(&data),
                )));
            }
            _ => {}
        }
    }
    let (size, flags) =
        export.ok_or_else(|| io::Error::other("the server does not say the export's size"))?;
    Ok(Export { size, flags, ..rest })
}

/// The kind and the data of an answer to an option.
fn option_reply(socket: &mut impl Read, to: u32) -> io::Result<(u32, Vec<u8>)> {
    let header: [u8; 20] = take(socket)?;
    let number = |at| u32::from_be_bytes(part(&header, at));
    let (option, kind, length) = (number(8), number(12), number(16));
    let is_reply = u64::from_be_bytes(part(&header, 0)) == OPTION_REPLY_MAGIC && option == to;
    if !is_reply || length > OPTION_REPLY_MAX {
        return Err(io::Error::other(
            "the server's answer to an option is not of the protocol",
        ));
    }
    let mut data = vec![0; length as usize];
    socket.read_exact(&mut data)?;
    Ok((kind, data))
}

/// The oldstyle protocol's greeting, which says everything at once.
pub(crate) fn old_hello(export: &Export) -> Vec<u8> {
    let mut hello = [
        MAGIC.to_be_bytes(),
        OLD_MAGIC.to_be_bytes(),
        export.size.to_be_bytes(),
    ]
    .concat();
    hello.extend(u32::from(export.flags).to_be_bytes());
    hello.resize(152, 0);
    hello
}

/// A server's greeting, for tests.
#[cfg(test)]
pub(crate) fn new_hello() -> Vec<u8> {
    let mut hello = [MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    hello
}

/// A server's answer to a client that asks for an export, for tests: it has this size, and can flush.
#[cfg(test)]
pub(crate) fn answer(socket: &mut (impl Read + Write), size: u64) -> io::Result<()> {
    let asked: [u8; 20] = take(socket)?;
    let mut rest = vec![0; u32::from_be_bytes(part(&asked, 16)) as usize];
    socket.read_exact(&mut rest)?;
    let mut export = INFO_EXPORT.to_be_bytes().to_vec();
    export.extend(size.to_be_bytes());
    export.extend((1 | SEND_FLUSH).to_be_bytes());
    for (kind, data) in [(REP_INFO, export), (REP_ACK, Vec::new())] {
        let header = [OPT_GO, kind, data.len() as u32].map(u32::to_be_bytes).concat();
        socket.write_all(&[&OPTION_REPLY_MAGIC.to_be_bytes()[..], &header, &data].concat())?;
    }
    Ok(())
}

fn info(data: &[u8]) -> Option<(u16, &[u8])> {
    let (kind, rest) = data.split_at_checked(2)?;
    Some((u16::from_be_bytes(part(kind, 0)), rest))
}

fn refusal(kind: u32, name: &str, said: &str) -> String {
    let why = match kind & !REP_ERR {
        1 => "it does not know NBD_OPT_GO",
        2 => "it does not permit it",
        5 => "it wants TLS: say nbds:// or nbds+unix://, and ?tls-certificates=DIR",
        6 => "it has no export of this name",
        7 => "it is shutting down",
        8 => "it wants another block size",
        _ => "without a reason that is known here",
    };
    let said = if said.is_empty() {
        String::new()
    } else {
        format!(" ({said})")
    };
    format!("the server refuses the export {name:?}: {why}{said}")
}

fn take<const N: usize>(socket: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export() -> Export {
        Export {
            size: 1 << 20,
            flags: 0x6d,
            blocks: Some((1, 4096, 1 << 25)),
            description: "a".to_owned(),
        }
    }

    #[test]
    fn a_device_goes_on_with_the_same_export_or_more_of_it() {
        let was = export();
        assert_eq!(was.obstacle(&was), None);
        assert_eq!(
            was.obstacle(&Export {
                size: 2 << 20,
                flags: 0xfd,
                ..export()
            }),
            None
        );
        for (now, word) in [
            (
                Export {
                    size: 4096,
                    ..export()
                },
                "bytes",
            ),
            (
                Export {
                    flags: 0x6f,
                    ..export()
                },
                "read-only",
            ),
            (
                Export {
                    flags: 0x69,
                    ..export()
                },
                "lacks",
            ),
            (
                Export {
                    blocks: Some((4096, 4096, 1 << 25)),
                    ..export()
                },
                "blocks",
            ),
        ] {
            let why = was.obstacle(&now).unwrap();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn a_device_goes_on_with_its_own_volume_alone_where_servers_say_which_they_have() {
        let said = |description: &str| Export {
            description: description.to_owned(),
            ..export()
        };
        let volume = said("Hypernbd volume 423a30c5-ce77-40c3-9299-a143d31c733a");
        let other = said("Hypernbd volume 0192d6a8-1234-4abc-8def-000000000001");
        let checkpoint = said("Hypernbd volume 423a30c5-ce77-40c3-9299-a143d31c733a, checkpoint 7");
        let [silent, old, foreign] = ["", "Hypernbd volume ", "a disk"].map(said);
        for now in [&other, &checkpoint, &silent, &old, &foreign] {
            let why = volume.obstacle(now).unwrap();
            assert!(why.contains("and was Hypernbd volume 423a30c5"), "{why}");
        }
        assert_eq!(volume.obstacle(&volume), None);
        for was in [&silent, &old, &foreign] {
            for now in [&volume, &silent, &old, &foreign] {
                assert_eq!(was.obstacle(now), None);
            }
        }
    }

    #[test]
    fn what_is_no_server_is_named() {
        struct Fixed(&'static [u8]);
        impl Read for Fixed {
            fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
                self.0.read(room)
            }
        }
        impl Write for Fixed {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let error = greet(&mut Fixed(b"HTTP/1.1 400 Bad Request\r\n")).unwrap_err();
        assert!(error.to_string().contains("no NBD server"), "{error}");
        let mut refused = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        refused.extend(OPT_GO.to_be_bytes());
        refused.extend((REP_ERR | 6).to_be_bytes());
        refused.extend(0_u32.to_be_bytes());
        let error = ask(&mut Fixed(refused.clone().leak()), "@gone", &[]).unwrap_err();
        assert!(error.to_string().contains("no export of this name"), "{error}");
        refused[11] += 1;
        let error = ask(&mut Fixed(refused.leak()), "@gone", &[]).unwrap_err();
        assert!(error.to_string().contains("not of the protocol"), "{error}");
    }
}
