//! States in memory: the reference implementation, for tests.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use async_trait::async_trait;

use super::{StateName, StateStore, check_size};
use crate::{error::Result, lock::lock};

/// Keeps states in memory. They survive an operation that fails, and nothing more.
#[derive(Debug, Default)]
pub struct MemoryState {
    states: Mutex<BTreeMap<StateName, Vec<u8>>>,
}

impl MemoryState {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The names under which there is a state.
    pub fn names(&self) -> Vec<StateName> {
        self.states().keys().cloned().collect()
    }

    fn states(&self) -> MutexGuard<'_, BTreeMap<StateName, Vec<u8>>> {
        lock(&self.states)
    }
}

#[async_trait]
impl StateStore for MemoryState {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    async fn load(&self, name: &StateName) -> Result<Option<Vec<u8>>> {
        Ok(self.states().get(name).cloned())
    }

    async fn save(&self, name: &StateName, state: Vec<u8>) -> Result<()> {
        check_size(name, &state)?;
        self.states().insert(name.clone(), state);
        Ok(())
    }

    async fn remove(&self, name: &StateName) -> Result<()> {
        self.states().remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::check(&MemoryState::new()).await.unwrap();
    }
}
