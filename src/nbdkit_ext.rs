//! What the binding lacks: the callbacks at the end of nbdkit's struct, a question about the server's age, and the
//! entry point that registers it all.
//!
//! Source of the layout: `nbdkit-plugin.h`, API version 2. New fields only ever come at its end, and `_struct_size`
//! tells the server how many there are.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::panic::catch_unwind;

use hypernbd_volume::past::export_name::Export;
use nbdkit::{Builder, Plugin, Result};

use crate::{Connection, errno, lifecycle, params};

/// The largest request taken in one piece, as the NBD protocol suggests.
const REQUEST_MAX_BYTES: u32 = 32 << 20;

/// Snapshots, or volumes, listed as exports. nbdkit takes 10,000 exports.
const EXPORTS_MAX: usize = 9999;

/// The volume as it is has the empty name, on a server of one.
const EXPORT_NAME: &CStr = c"";
const EXPORT_DESCRIPTION: &CStr = c"Hypernbd volume";

/// The binding's struct with the fields that follow it in nbdkit's.
#[repr(C)]
pub struct PluginWithExtensions {
    base: Plugin,
    list_exports: extern "C" fn(readonly: c_int, is_tls: c_int, exports: *mut c_void) -> c_int,
    default_export: extern "C" fn(readonly: c_int, is_tls: c_int) -> *const c_char,
    export_description: extern "C" fn(handle: *mut c_void) -> *const c_char,
    cleanup: extern "C" fn(),
    block_size:
        extern "C" fn(*mut c_void, minimum: *mut u32, preferred: *mut u32, maximum: *mut u32) -> c_int,
}

/// Threads for the requests of one connection, unless nbdkit is told another number.
const THREADS_DEFAULT: u64 = 16;

/// How many threads nbdkit has for the requests of one connection (`--threads`). Plugins are not told.
pub fn threads() -> u64 {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    threads_in(line.split('\0')).unwrap_or(THREADS_DEFAULT)
}

/// The number in nbdkit's command line; the last one counts.
fn threads_in<'a>(words: impl Iterator<Item = &'a str>) -> Option<u64> {
    let mut words = words.skip(1);
    let mut found = None;
    while let Some(word) = words.next() {
        let value = match word {
            "-t" | "--threads" => words.next(),
            _ => word
                .strip_prefix("--threads=")
                .or_else(|| word.strip_prefix("-t")),
        };
        found = value.and_then(|value| value.parse().ok()).or(found);
    }
    // 0 is the default, too.
    found.filter(|number| *number > 0)
}

/// Options of nbdkit of one letter that take no value, so that further ones may follow in the same word.
const FLAGS: &[u8] = b"fnorsvV";

/// Whether nbdkit was started read-only (`-r`). Plugins are told only when a client connects, which is too late to tell
/// on the terminal whether the volume can be served.
pub fn is_read_only_server() -> bool {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    line.split(|byte| *byte == 0).skip(1).any(|word| match word {
        b"--readonly" | b"--read-only" => true,
        [b'-', flags @ ..] => flags.iter().take_while(|f| FLAGS.contains(f)).any(|f| *f == b'r'),
        _ => false,
    })
}

unsafe extern "C" {
    /// `nbdkit_nanosleep(3)`: -1 when the server is shutting down or the connection has ended.
    fn nbdkit_nanosleep(seconds: c_uint, nanoseconds: c_uint) -> c_int;
    /// `nbdkit_strdup_intern(3)`: a copy that nbdkit frees at its end; null without memory.
    fn nbdkit_strdup_intern(text: *const c_char) -> *const c_char;
    /// `nbdkit_add_export(3)`: copies both strings.
    fn nbdkit_add_export(exports: *mut c_void, name: *const c_char, description: *const c_char) -> c_int;
}

/// The entry point, called once by nbdkit after loading the library.
// SAFETY: the name is nbdkit's convention and nothing else in the library has it.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_init() -> *const PluginWithExtensions {
    let callbacks = Builder {
        after_fork: true,
        cache: true,
        can_cache: true,
        can_extents: true,
        can_flush: true,
        can_fast_zero: true,
        can_fua: true,
        can_multi_conn: true,
        can_trim: true,
        can_write: true,
        can_zero: true,
        config: true,
        config_complete: true,
        config_help: true,
        dump_plugin: true,
        extents: true,
        flush: true,
        get_ready: true,
        is_rotational: true,
        load: true,
        preconnect: true,
        thread_model: true,
        trim: true,
        unload: true,
        write_at: true,
        zero: true,
    };
    let base = callbacks.into_ptr::<Connection>().cast_mut();
    // SAFETY: the binding made this pointer with `Box::into_raw` and kept no copy of it.
    let mut base = *unsafe { Box::from_raw(base) };
    base._struct_size = size_of::<PluginWithExtensions>() as u64;
    // nbdkit never gives the struct back.
    Box::leak(Box::new(PluginWithExtensions {
        base,
        list_exports,
        default_export,
        export_description,
        cleanup,
        block_size,
    }))
}

/// Whether this nbdkit keeps running when a client disconnects with replies pending. Those from 1.34 on do, and can
/// be told by a function that came with it.
pub fn survives_disconnects() -> bool {
    // SAFETY: a look-up by a valid C string, of which only whether it finds anything is used.
    !unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"nbdkit_disconnect".as_ptr()) }.is_null()
}

/// Whether the server is shutting down, or the connection of this thread has ended. Asked by a sleep, which is the way that
/// nbdkit tells a plugin.
pub fn is_ending() -> bool {
    // SAFETY: two numbers; it touches nothing of ours.
    unsafe { nbdkit_nanosleep(0, 1_000_000) != 0 }
}

/// What the client of this thread asks for.
///
/// # Errors
/// For names that no export has: a client that asks for something else must not get a volume.
pub fn export() -> Result<Export> {
    let name = nbdkit::export_name().map_err(|error| errno::error(libc::EINVAL, error.to_string()))?;
    Export::parse(&name, params::is_of_many()).map_err(|error| errno::error(libc::EINVAL, error.to_string()))
}

extern "C" fn list_exports(_readonly: c_int, _is_tls: c_int, exports: *mut c_void) -> c_int {
    if !params::is_of_many() {
        // SAFETY: the list is the one nbdkit just handed over; the strings are constants.
        let added = unsafe { nbdkit_add_export(exports, EXPORT_NAME.as_ptr(), EXPORT_DESCRIPTION.as_ptr()) };
        if added == -1 {
            return -1;
        }
    }
    // A panic must not reach nbdkit; what is missing in the list can be asked for all the same.
    let listed = catch_unwind(lifecycle::exports).unwrap_or_default();
    for (name, description) in listed.into_iter().take(EXPORTS_MAX) {
        let (Ok(name), Ok(description)) = (CString::new(name), CString::new(description)) else {
            continue;
        };
        // SAFETY: the list is the one nbdkit handed over; both strings live until after the call, which copies them.
        if unsafe { nbdkit_add_export(exports, name.as_ptr(), description.as_ptr()) } == -1 {
            return -1;
        }
    }
    0
}

extern "C" fn default_export(_readonly: c_int, _is_tls: c_int) -> *const c_char {
    EXPORT_NAME.as_ptr()
}

/// Says which volume it is, in words that `hypernbd attach` compares: another one may come to be served at the same address.
extern "C" fn export_description(_handle: *mut c_void) -> *const c_char {
    // A panic must not reach nbdkit.
    let identity = catch_unwind(|| lifecycle::identity(&export().ok()?))
        .ok()
        .flatten();
    let Some(text) = identity.and_then(|identity| CString::new(format!("Hypernbd volume {identity}")).ok())
    else {
        return EXPORT_DESCRIPTION.as_ptr();
    };
    // SAFETY: the text lives until after the call, which copies it.
    let kept = unsafe { nbdkit_strdup_intern(text.as_ptr()) };
    match kept.is_null() {
        true => EXPORT_DESCRIPTION.as_ptr(),
        false => kept,
    }
}

/// Comes when all connections have ended and nbdkit's threads still run: the better moment to end than `unload`,
/// which is left for the ways that do not pass here.
extern "C" fn cleanup() {
    lifecycle::stop();
}

extern "C" fn block_size(
    _handle: *mut c_void,
    minimum: *mut u32,
    preferred: *mut u32,
    maximum: *mut u32,
) -> c_int {
    // A panic must not reach nbdkit; without an answer the server advertises no constraint.
    let block_bytes = catch_unwind(|| lifecycle::block_size_bytes(&export().ok()?))
        .ok()
        .flatten();
    let (least, best, most) = match block_bytes {
        Some(bytes) => (1, bytes.clamp(512, REQUEST_MAX_BYTES), REQUEST_MAX_BYTES),
        None => (0, 0, 0),
    };
    // SAFETY: nbdkit passes pointers to three values of its own.
    unsafe {
        minimum.write(least);
        preferred.write(best);
        maximum.write(most);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threads_of_a_connection_are_those_of_the_command_line() {
        for (line, expected) in [
            ("nbdkit -f plugin.so", None),
            ("nbdkit -t 4 plugin.so", Some(4)),
            ("nbdkit -t4 plugin.so", Some(4)),
            ("nbdkit --threads 4 plugin.so --threads=8", Some(8)),
            ("nbdkit --threads=0 plugin.so", None),
            ("nbdkit --tls=require plugin.so", None),
        ] {
            assert_eq!(threads_in(line.split(' ')), expected, "{line}");
        }
    }
}
