//! Where long operations keep how far they are, so that they can go on after a crash.

#[cfg(any(test, feature = "testkit"))]
pub mod conformance;
#[cfg(any(test, feature = "testkit"))]
mod failing;
mod file;
mod memory;
mod mongo;

use std::{fmt, str::FromStr};

use async_trait::async_trait;

#[cfg(any(test, feature = "testkit"))]
pub use self::failing::{FailingState, SaveFailure};
pub use self::{file::FileState, memory::MemoryState, mongo::MongoState};
use crate::error::{Error, Result};

/// Keeps a few small states under their names, each replaced as a whole.
///
/// Every implementation must keep these promises, which `conformance::check` (feature `testkit`) checks:
/// - When [`save`](Self::save) has returned, the state survives a crash of this process and of the store.
/// - A state is the old one or the new one, whatever happens in between, never a part of one.
/// - A name has the state that was saved last; of two savers at a time, either one's.
#[async_trait]
pub trait StateStore: fmt::Debug + Send + Sync + 'static {
    /// What and where it is, for messages. Tells no secret.
    fn describe(&self) -> String;

    /// The state under a name, if there is one.
    ///
    /// # Errors
    /// `CorruptData` when it is not what was saved, else the store's own.
    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>>;

    /// Puts a state under a name, in place of what was there. At most 15 MiB.
    ///
    /// # Errors
    /// The store's own; then the old state or the new one is there.
    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()>;

    /// Removes the state under a name. None being there is no error.
    ///
    /// # Errors
    /// The store's own.
    async fn remove(&self, name: &StateName) -> Result<()>;
}

/// The name of a state: up to 100 of the characters `a`–`z`, `0`–`9`, `-`, `_` and `.`, which does not come first.
///
/// ```
/// use mongo_core::state::StateName;
///
/// let name: StateName = "restore-1f3a".parse()?;
/// assert_eq!(name.as_str(), "restore-1f3a");
/// assert!("../secrets".parse::<StateName>().is_err());
/// # Ok::<_, mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateName(String);

impl StateName {
    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for StateName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
        if name.is_empty() || name.len() > LONGEST_NAME || name.starts_with('.') || !name.bytes().all(allowed) {
            return Err(Error::invalid(
                "the name of a state has up to 100 of the characters a-z, 0-9, - _ and ., which is not the first",
            )
            .with_context("name", name));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A document holds 16 MiB, and a little of that is the name and the time.
const LARGEST: usize = 15 << 20;
const LONGEST_NAME: usize = 100;

fn check_size(name: &StateName, state: &[u8]) -> Result<()> {
    if state.len() > LARGEST {
        return Err(Error::invalid("a state may have 15 MiB").with_context("name", name).with_context("bytes", state.len()));
    }
    Ok(())
}
