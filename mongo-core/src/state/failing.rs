//! A store of states that fails on purpose.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use async_trait::async_trait;

use super::{StateName, StateStore};
use crate::error::{Error, ErrorKind, Result};

/// What a failing `save` does to the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SaveFailure {
    /// The old state stays.
    Before,
    /// The new state is there, but the caller does not learn it.
    After,
}

/// Wraps a store and lets the `n`-th `save`, and every one after it, fail.
#[derive(Debug)]
pub struct FailingState {
    inner: Arc<dyn StateStore>,
    good: u64,
    saves: AtomicU64,
    failure: SaveFailure,
}

impl FailingState {
    /// Lets the first `good` saves through.
    pub fn new(inner: Arc<dyn StateStore>, good: u64, failure: SaveFailure) -> Self {
        Self { inner, good, saves: AtomicU64::new(0), failure }
    }

    /// How many saves were asked for.
    pub fn saves(&self) -> u64 {
        self.saves.load(SeqCst)
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl StateStore for FailingState {
    fn describe(&self) -> String {
        format!("failing {}", self.inner.describe())
    }

    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        self.inner.load(name).await
    }

    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()> {
        let fails = self.saves.fetch_add(1, SeqCst) >= self.good;
        if !fails || self.failure == SaveFailure::After {
            self.inner.save(name, state).await?;
        }
        if fails {
            return Err(Error::new(ErrorKind::Unavailable, "the store of states fails on purpose").with_context("name", name));
        }
        Ok(())
    }

    async fn remove(&self, name: &StateName) -> Result<()> {
        self.inner.remove(name).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{MemoryState, conformance};

    #[tokio::test]
    async fn conforms_while_it_does_not_fail() {
        conformance::check(&FailingState::new(Arc::new(MemoryState::new()), u64::MAX, SaveFailure::Before)).await.unwrap();
    }

    #[tokio::test]
    async fn fails_from_the_given_save_on() {
        let inner = Arc::new(MemoryState::new());
        for (failure, left) in [(SaveFailure::Before, b"1".to_vec()), (SaveFailure::After, b"2".to_vec())] {
            let states = FailingState::new(Arc::<MemoryState>::clone(&inner), 1, failure);
            let name = "some".parse().unwrap();
            states.save(&name, b"1".to_vec()).await.unwrap();
            assert!(states.save(&name, b"2".to_vec()).await.is_err());
            assert_eq!(states.load(&name).await.unwrap(), Some(left));
        }
    }
}
