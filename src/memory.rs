//! Keeps the C library's allocator from holding on to memory.
//!
//! glibc raises its thresholds for mapping and trimming when large blocks are freed, up to 32 MiB and 64 MiB, and gives
//! every thread a heap of its own, on which what a publish freed stays: a server grows to twice its write buffer. Setting
//! either threshold turns the first off, and one heap for all the second (mallopt(3)).

/// Larger blocks (the pieces of an upload) are mapped, and go back to the system when they are freed.
const MMAP_THRESHOLD_BYTES: libc::c_int = 16 << 20;
/// Free memory at the end of a heap above this goes back to the system.
const TRIM_THRESHOLD_BYTES: libc::c_int = 32 << 20;

/// Sets the thresholds. Once, before there are threads of ours.
pub fn bound_allocator() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (libc::M_ARENA_MAX, 1),
    ] {
        // SAFETY: mallopt takes two numbers and owns nothing; it may be called at any time, from any thread.
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            log::warn!(
                "the allocator refused a setting; the server may use more memory than its write buffer"
            );
        }
    }
}
