//! What is logged, and what of the words of `RUST_LOG` means nothing here.

use log::LevelFilter;

/// What is logged of what `RUST_LOG` does not name.
pub const LOG_LEVEL_DEFAULT: LevelFilter = LevelFilter::Warn;

/// The engine's module that warns each time an object is not there, which is how it looks for the newest ones. Of it
/// only errors are logged, unless `RUST_LOG` names it.
pub const LOG_MODULE_NOISY: &str = "hyperfile::s3commons";

/// What names of what logs begin with.
const KNOWN: [&str; 8] = [
    "hypernbd",
    "hyperfile",
    "btree_ondisk",
    "aws",
    "hyper",
    "foyer",
    "rustls",
    "s3s",
];

/// What is wrong with these words of `RUST_LOG`, if one of them is neither a level nor the name of what logs here. The logger takes a
/// misspelt level for the name of a module, and says nothing.
pub fn unknown_log_word(words: &str) -> Option<String> {
    let names = words.split('/').next().unwrap_or_default().split(',');
    let mut names = names.map(|word| word.split('=').next().unwrap_or_default().trim());
    let unknown = names.find(|name| {
        let is_level = name.parse::<LevelFilter>().is_ok();
        !name.is_empty() && !is_level && !KNOWN.iter().any(|known| name.starts_with(known))
    })?;
    Some(format!(
        "{unknown} is no level and nothing that logs here; write it as for RUST_LOG, as in info or hypernbd_volume=debug"
    ))
}

/// The same of the environment's `RUST_LOG`.
pub fn unknown_log_word_of_environment() -> Option<String> {
    unknown_log_word(&std::env::var("RUST_LOG").ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_level_is_told() {
        for (words, unknown) in [
            ("", None),
            (" , ", None),
            ("off", None),
            ("INFO,hypernbd_volume=debug", None),
            ("hypernbd=info, aws_config=trace/some text", None),
            ("inof", Some("inof")),
            ("info,volume=debug", Some("volume")),
        ] {
            let told = unknown_log_word(words);
            let told = told.as_deref().and_then(|told| told.split(' ').next());
            assert_eq!(told, unknown, "{words}");
        }
    }
}
