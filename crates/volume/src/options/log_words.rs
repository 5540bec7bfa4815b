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

const AS_FOR: &str = "write it as for RUST_LOG, as in info or hypernbd_volume=debug";

/// Words of `RUST_LOG`, read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogWords {
    /// Those that the logger understands. It leaves out the others by itself, and says so in lines that are none of the log.
    pub understood: String,
    /// What is wrong with the first one that it does not understand, or that names neither a level nor what logs here: it takes a misspelt
    /// level for the name of a module, and says nothing.
    pub wrong: Option<String>,
}

impl LogWords {
    /// Reads these.
    pub fn read(words: &str) -> Self {
        let Some(first) = refusal(words) else {
            return Self {
                understood: words.to_owned(),
                wrong: unknown(words),
            };
        };
        // What stands behind the first slash is looked for in each line.
        let (names, text) = words.split_at(words.find('/').unwrap_or(words.len()));
        let is_understood = |word: &&str| refusal(word).is_none();
        let names: Vec<&str> = names.split(',').filter(is_understood).collect();
        let text = Some(text).filter(is_understood).unwrap_or_default();
        Self {
            understood: format!("{}{text}", names.join(",")),
            wrong: Some(format!("{first}; {AS_FOR}")),
        }
    }

    /// Reads the environment's `RUST_LOG`. Of none there are no words.
    pub fn of_environment() -> Self {
        std::env::var("RUST_LOG").map_or_else(|_| Self::default(), |words| Self::read(&words))
    }
}

/// Why the logger does not understand all of this.
fn refusal(words: &str) -> Option<String> {
    let refused = env_filter::Builder::new().try_parse(words).err()?;
    Some(refused.to_string())
}

fn unknown(words: &str) -> Option<String> {
    let names = words.split('/').next().unwrap_or_default().split(',');
    let mut names = names.map(|word| word.split('=').next().unwrap_or_default().trim());
    let unknown = names.find(|name| {
        let is_level = name.parse::<LevelFilter>().is_ok();
        !name.is_empty() && !is_level && !KNOWN.iter().any(|known| name.starts_with(known))
    })?;
    Some(format!(
        "{unknown} is no level and nothing that logs here; {AS_FOR}"
    ))
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
            let LogWords { understood, wrong } = LogWords::read(words);
            let told = wrong.as_deref().and_then(|told| told.split(' ').next());
            assert_eq!(told, unknown, "{words}");
            assert_eq!(understood, words);
        }
    }

    #[test]
    fn what_the_logger_would_refuse_is_told_and_the_rest_is_used() {
        for (words, understood, told) in [
            ("hypernbd_volume=inof", "", "inof"),
            ("info,hypernbd_volume=inof", "info", "inof"),
            (
                "info,hypernbd=debug=x,hyper=warn/text",
                "info,hyper=warn/text",
                "debug=x",
            ),
            ("info/one/two", "info", "too many"),
        ] {
            let read = LogWords::read(words);
            assert_eq!(read.understood, understood, "{words}");
            let wrong = read.wrong.expect("something is wrong");
            assert!(wrong.contains(told) && wrong.contains("RUST_LOG"), "{wrong}");
            assert_eq!(refusal(&read.understood), None, "{words}");
        }
    }
}
