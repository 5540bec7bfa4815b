//! The id of a volume.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A volume's id: a random UUID (RFC 9562, version 4). Ids name directories and are read from stores, so nothing but a
/// UUID in the form that we write it in is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(Uuid);

impl VolumeId {
    /// A new one.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// This UUID.
    pub fn from_uuid(id: Uuid) -> Self {
        Self(id)
    }

    /// As it stands in binary records.
    pub fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for VolumeId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Uuid::try_parse(&text)
            .ok()
            .map(Self)
            .filter(|id| id.to_string() == text)
            // Escaped: it comes from a store, and may go to a terminal.
            .ok_or_else(|| format!("{:?} is no volume id", text.chars().take(40).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_uuid_as_we_write_it_is_an_id() {
        let good = "0192d6a8-1234-4abc-8def-000000000001";
        assert_eq!(VolumeId::try_from(good.to_owned()).unwrap().to_string(), good);
        for wrong in [
            "",
            "..",
            "../x",
            "/etc",
            "0192d6a8-1234-4abc-8def-00000000000",
            "0192D6A8-1234-4ABC-8DEF-000000000001",
            "{0192d6a8-1234-4abc-8def-000000000001}",
            "0192d6a812344abc8def000000000001",
            "urn:uuid:0192d6a8-1234-4abc-8def-000000000001",
            "0192d6a8-1234-4abc-8def-000000000001/..",
            "\u{1b}[2J",
        ] {
            let refused = VolumeId::try_from(wrong.to_owned()).unwrap_err();
            assert!(!refused.contains('\u{1b}'), "{refused:?}");
            let json = serde_json::to_string(wrong).unwrap();
            assert!(serde_json::from_str::<VolumeId>(&json).is_err(), "{wrong}");
        }
    }
}
