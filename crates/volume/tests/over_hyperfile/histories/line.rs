//! What a volume may read as.

use std::sync::Arc;

/// Whole contents of a volume.
pub type Contents = Arc<Vec<u8>>;

/// The contents after each change since they were last known, oldest first.
#[derive(Debug, Clone)]
pub struct Line {
    states: Vec<Contents>,
    /// The newest that a flush covered: nothing older may come back.
    flushed: usize,
    /// The newest that is certainly in the container, and not in a log alone.
    published: usize,
}

/// From where on contents are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// The last change that was answered.
    Answered,
    /// The last flush.
    Flushed,
    /// What was last published: the log was given up.
    Published,
}

impl Line {
    pub fn known(contents: Vec<u8>) -> Self {
        Self {
            states: vec![Arc::new(contents)],
            flushed: 0,
            published: 0,
        }
    }

    pub fn newest(&self) -> &Contents {
        &self.states[self.states.len() - 1]
    }

    /// What is certainly in the container.
    pub fn container(&self) -> &Contents {
        &self.states[self.published]
    }

    pub fn size_bytes(&self) -> usize {
        self.newest().len()
    }

    /// A change was answered.
    pub fn changed(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut contents = Vec::clone(self.newest());
        change(&mut contents);
        self.states.push(Arc::new(contents));
    }

    /// A flush was answered, which published when there is no log.
    pub fn flushed(&mut self, is_logged: bool) {
        self.flushed = self.states.len() - 1;
        if !is_logged {
            self.published = self.flushed;
        }
    }

    /// Everything was published.
    pub fn published(&mut self) {
        self.flushed(false);
    }

    /// Whether the newest state is certainly in the container.
    pub fn is_published(&self) -> bool {
        self.published + 1 == self.states.len()
    }

    /// The log was given up: what was flushed to it alone may be gone.
    pub fn wal_given_up(&mut self) {
        self.flushed = self.published;
    }

    /// Whether these contents may be there; from now on they are what is there.
    pub fn found(&mut self, contents: Vec<u8>, since: Since) -> Result<(), String> {
        let from = match since {
            Since::Answered => self.states.len() - 1,
            Since::Flushed => self.flushed,
            Since::Published => self.published,
        };
        if self.states[from..].iter().any(|state| **state == contents) {
            *self = Self::known(contents);
            return Ok(());
        }
        let older = self.states[..from].iter().rposition(|state| **state == contents);
        Err(match older {
            Some(at) => format!("state {at}, and {from} was flushed"),
            None => self.difference(&contents),
        })
    }

    /// Where the newest state differs first.
    fn difference(&self, contents: &[u8]) -> String {
        let newest = self.newest();
        let mut pairs = newest.iter().zip(contents);
        match pairs.position(|(want, is)| want != is) {
            Some(at) => format!(
                "none of its states; byte {at} is {} and not {}",
                contents[at], newest[at]
            ),
            None => format!("{} bytes and not {}", contents.len(), newest.len()),
        }
    }
}
