//! Which of many volumes something is about: `?volume=NAME`.

use hyper::StatusCode;

use super::control::{Refusal, Verb};
use super::{Monitor, Now, State};
use crate::base::volume_name::VolumeName;

/// The volume that a query names, if it names one. Pure.
pub(super) fn named(query: Option<&str>) -> Result<Option<VolumeName>, Refusal> {
    let bad = |why: String| Refusal::new(StatusCode::BAD_REQUEST, why);
    let mut found = None;
    for part in query
        .unwrap_or_default()
        .split('&')
        .filter(|part| !part.is_empty())
    {
        let value = part.strip_prefix("volume=").filter(|_| found.is_none());
        let value = value.ok_or_else(|| bad("the query is not ?volume=NAME".to_owned()))?;
        let text = decoded(value).ok_or_else(|| bad("the name in the query is not UTF-8".to_owned()))?;
        let name: VolumeName = text
            .parse()
            .map_err(|why| bad(format!("the query names no volume: {why}")))?;
        found = Some(name);
    }
    Ok(found)
}

/// Without the escapes of a URL.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                let digit = |byte: u8| char::from(byte).to_digit(16);
                u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?
            }
            _ => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

impl Verb {
    /// Whether it is about a volume, and not the server.
    fn is_of_volume(&self) -> bool {
        match self {
            Self::Shutdown { .. } => false,
            Self::Set(settings) => settings.checkpoint_interval.is_some(),
            _ => true,
        }
    }
}

impl Monitor {
    /// Refuses what does not say which volume it is about, and what says it for nothing.
    pub(super) fn check_subject(&self, verb: &Verb, volume: Option<&VolumeName>) -> Result<(), Refusal> {
        let why = match (self.is_of_many, volume) {
            (true, None) if verb.is_of_volume() => {
                "this server has many volumes: say which one, as in /v1/flush?volume=NAME"
            }
            (true, Some(_)) if !verb.is_of_volume() => "this is about the server, not about one volume",
            (false, Some(_)) => "this server has one volume, which is not asked for by a name",
            _ => return Ok(()),
        };
        Err(Refusal::new(StatusCode::BAD_REQUEST, why))
    }

    /// What is served now of that volume, or of the only one.
    pub(super) fn now_of(&self, volume: Option<&VolumeName>) -> Now {
        let whole = self.served.now();
        let Some(name) = volume.filter(|_| whole.state != State::Ending) else {
            return whole;
        };
        let named = self.served.named().into_iter();
        let mut named = named.filter(|(found, _)| found == name.as_str());
        named.next().map_or(
            Now {
                state: State::Waiting,
                volume: None,
                connections: 0,
            },
            |(_, now)| now,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::Settings;
    use super::*;

    #[test]
    fn a_query_names_a_volume() {
        for (query, name) in [
            (None, None),
            (Some(""), None),
            (Some("volume=disk"), Some("disk")),
            (Some("volume=with%20space"), Some("with space")),
            (Some("volume=Gr%C3%b6sse"), Some("Grösse")),
        ] {
            let name: Option<VolumeName> = name.map(|name| name.parse().unwrap());
            assert_eq!(named(query).unwrap(), name, "{query:?}");
        }
        for query in [
            "disk",
            "volume=",
            "volume=a&volume=b",
            "other=x",
            "volume=%",
            "volume=%2",
            "volume=%zz",
            "volume=%ff",
            "volume=a%2Fb",
            "volume=..",
        ] {
            assert!(named(Some(query)).is_err(), "{query}");
        }
    }

    #[test]
    fn only_what_is_about_the_server_needs_no_volume() {
        assert!(Verb::Flush.is_of_volume() && Verb::Compact.is_of_volume());
        assert!(!Verb::Shutdown { when_idle: true }.is_of_volume());
        let set = |log: bool| {
            let value = || Some("5s".to_owned());
            Verb::Set(match log {
                true => Settings {
                    log: value(),
                    ..Settings::default()
                },
                false => Settings {
                    checkpoint_interval: value(),
                    ..Settings::default()
                },
            })
        };
        assert!(!set(true).is_of_volume() && set(false).is_of_volume());
    }
}
