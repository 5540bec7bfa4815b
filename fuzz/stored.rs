//! The readers of what is stored (`hypernbd_volume::readers`), given anything: none may panic.
//!
//! `HYPERNBD_READER` names the one to try; without it the first byte of the input chooses.

#![no_main]

use std::sync::LazyLock;

use hypernbd_volume::readers::{READERS, Reader};
use libfuzzer_sys::fuzz_target;

static CHOSEN: LazyLock<Option<&Reader>> = LazyLock::new(|| {
    let name = std::env::var("HYPERNBD_READER").ok()?;
    let found = READERS.iter().find(|reader| reader.name == name);
    Some(found.unwrap_or_else(|| panic!("there is no reader {name}")))
});

fuzz_target!(|input: &[u8]| {
    let (reader, bytes) = match (*CHOSEN, input.split_first()) {
        (Some(reader), _) => (reader, input),
        (None, Some((choice, rest))) => (&READERS[usize::from(*choice) % READERS.len()], rest),
        (None, None) => return,
    };
    let _ = (reader.read)(bytes);
});
