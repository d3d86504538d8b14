//! What somebody has seen, to be carried to wherever they read next.

use std::{collections::BTreeMap, fmt, str::FromStr};

use mongo_core::{Error, Result, bson::Timestamp};

use crate::class::is_name;

/// How far somebody has seen each deployment: what they read next is not older.
///
/// Operation times of independent deployments cannot be compared, so there is one for each. As text it fits into a header or a cookie, and so goes from process to process.
///
/// ```
/// use mongo_core::bson::Timestamp;
/// use mongo_workload::ReadToken;
///
/// let mut token = ReadToken::default();
/// // After a write in a session: session.operation_time()
/// token.note("shop", Timestamp { time: 1_790_000_000, increment: 7 })?;
/// assert_eq!(token.to_string(), "shop=1790000000.7");
/// assert_eq!("shop=1790000000.7".parse::<ReadToken>()?, token);
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadToken(BTreeMap<String, Timestamp>);

impl ReadToken {
    /// Somebody has seen a deployment as it was then, by a write of their own or by what they read. Whoever notes what they read, too, never goes back in time.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is not 1 to 64 letters, digits, `_`, `-` and `.`.
    pub fn note(&mut self, deployment: &str, at: Timestamp) -> Result<()> {
        if !is_name(deployment) {
            return Err(Error::invalid("a deployment is named by 1 to 64 letters, digits, '_', '-' and '.' in a token"));
        }
        match self.0.get_mut(deployment) {
            Some(seen) => *seen = (*seen).max(at),
            None => drop(self.0.insert(deployment.to_owned(), at)),
        }
        Ok(())
    }

    /// Somebody has seen what another token says, too.
    pub fn merge(&mut self, other: &Self) {
        for (deployment, at) in &other.0 {
            let seen = self.0.entry(deployment.clone()).or_insert(*at);
            *seen = (*seen).max(*at);
        }
    }

    /// How far a deployment was seen.
    pub fn seen(&self, deployment: &str) -> Option<Timestamp> {
        self.0.get(deployment).copied()
    }
}

impl fmt::Display for ReadToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (deployment, at)) in self.0.iter().enumerate() {
            write!(f, "{}{deployment}={}.{}", if position == 0 { "" } else { "," }, at.time, at.increment)?;
        }
        Ok(())
    }
}

impl FromStr for ReadToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut token = Self::default();
        if text.len() > LONGEST {
            return Err(Error::invalid("a token is not that long"));
        }
        for entry in text.split(',').filter(|entry| !entry.is_empty()) {
            let parsed = entry.split_once('=').and_then(|(name, at)| {
                let (time, increment) = at.split_once('.')?;
                Some((name, Timestamp { time: time.parse().ok()?, increment: increment.parse().ok()? }))
            });
            let (name, at) = parsed.ok_or_else(|| Error::invalid("a token reads name=seconds.ordinal, separated by commas"))?;
            token.note(name, at)?;
        }
        Ok(token)
    }
}

/// It comes from outside.
const LONGEST: usize = 8192;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_only_goes_forward() {
        let at = |time, increment| Timestamp { time, increment };
        let mut token = ReadToken::default();
        token.note("a", at(5, 2)).unwrap();
        token.note("a", at(5, 1)).unwrap();
        token.note("b", at(1, 1)).unwrap();
        let mut other = ReadToken::default();
        other.note("a", at(4, 9)).unwrap();
        other.note("c", at(7, 7)).unwrap();
        token.merge(&other);
        assert_eq!(
            [token.seen("a"), token.seen("b"), token.seen("c"), token.seen("d")],
            [Some(at(5, 2)), Some(at(1, 1)), Some(at(7, 7)), None]
        );
        assert!(token.note("two words", at(1, 1)).is_err());
        for wrong in ["a", "a=1", "a=1.x", "a=.", "=1.1", "a=1.1;b=1.1", "a b=1.1", "a=99999999999.1"] {
            assert!(wrong.parse::<ReadToken>().is_err(), "{wrong}");
        }
        assert_eq!("".parse::<ReadToken>().unwrap(), ReadToken::default());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(entries in prop::collection::btree_map("[a-zA-Z0-9_.-]{1,12}", (any::<u32>(), any::<u32>()), 0..5), noise in ".{0,40}") {
            let mut token = ReadToken::default();
            for (name, (time, increment)) in &entries {
                token.note(name, Timestamp { time: *time, increment: *increment }).unwrap();
            }
            prop_assert_eq!(token.to_string().parse::<ReadToken>().unwrap(), token);
            // Anything is read or refused.
            if let Ok(read) = noise.parse::<ReadToken>() {
                prop_assert_eq!(read.to_string().parse::<ReadToken>().unwrap(), read);
            }
        }
    }
}
