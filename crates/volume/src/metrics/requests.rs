//! What clients ask for: how often, how many bytes, how long it took, what failed.

use std::time::Instant;

use super::count::{Count, Durations};

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes are read.
    Read,
    /// Bytes are written.
    Write,
    /// Bytes are written, zeroed or dropped, and are durable before the reply.
    Fua,
    /// Everything is made durable.
    Flush,
    /// Bytes are zeroed.
    Zero,
    /// Blocks are dropped.
    Trim,
    /// Bytes are brought into the cache.
    Cache,
    /// What bytes are is asked.
    Extents,
}

impl Kind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Fua,
        Self::Flush,
        Self::Zero,
        Self::Trim,
        Self::Cache,
        Self::Extents,
    ];

    /// Its name where it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Fua => "fua",
            Self::Flush => "flush",
            Self::Zero => "zero",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::Extents => "extents",
        }
    }
}

/// Requests of one kind.
#[derive(Debug, Default)]
pub struct OfKind {
    /// How long each took, the failed ones too.
    pub durations: Durations,
    /// Bytes that the ones that succeeded were about.
    pub bytes: Count,
    /// How many failed.
    pub failures: Count,
}

/// Requests of all kinds.
#[derive(Debug, Default)]
pub struct Requests([OfKind; Kind::ALL.len()]);

impl Requests {
    /// Those of one kind.
    pub fn of(&self, kind: Kind) -> &OfKind {
        &self.0[kind as usize]
    }

    /// Carries a request out, which is about `len_bytes`, and counts it.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn count<T, E>(
        &self,
        kind: Kind,
        len_bytes: u64,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let of_kind = self.of(kind);
        let began = Instant::now();
        let done = work();
        of_kind.durations.observe(began.elapsed());
        match &done {
            Ok(_) => of_kind.bytes.add(len_bytes),
            Err(_) => of_kind.failures.one(),
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_under_its_kind() {
        let requests = Requests::default();
        for kind in Kind::ALL {
            assert_eq!(
                requests.count(kind, 10, || Ok::<_, ()>(kind.name())),
                Ok(kind.name())
            );
        }
        assert_eq!(requests.count(Kind::Read, 10, || Err::<(), _>("why")), Err("why"));
        for kind in Kind::ALL {
            let of_kind = requests.of(kind);
            let failed = u64::from(kind == Kind::Read);
            let seen = (of_kind.durations.distribution().count(), of_kind.failures.get());
            assert_eq!(seen, (1 + failed, failed), "{kind:?}");
            assert_eq!(of_kind.bytes.get(), 10, "{kind:?}: what failed moved nothing");
        }
    }
}
