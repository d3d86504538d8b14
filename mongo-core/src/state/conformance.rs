//! What every [`StateStore`] must do, as checks that any implementation can run.

use super::{StateName, StateStore};
use crate::error::{Error, Result};

/// Runs every check against a store that is used by nobody else.
///
/// # Errors
/// The first promise of [`StateStore`] that is broken, or the store's own error.
pub async fn check(store: &dyn StateStore) -> Result<()> {
    let (one, other): (StateName, StateName) = ("one".parse()?, "one.other".parse()?);
    expect(store.load(&one).await?.is_none(), "there is no state before one was saved")?;
    store.remove(&one).await?;
    for state in [b"first".to_vec(), Vec::new(), vec![7; 15 << 20], (0..=255).collect()] {
        store.save(&one, state.clone()).await?;
        expect(store.load(&one).await? == Some(state), "a state is loaded as it was saved")?;
    }
    expect(store.save(&one, vec![0; (15 << 20) + 1]).await.is_err(), "a state that is too large is refused")?;
    store.save(&other, b"another".to_vec()).await?;
    expect(store.load(&one).await? == Some((0..=255).collect()), "a state does not touch another")?;
    store.remove(&one).await?;
    expect(store.load(&one).await?.is_none(), "a state that was removed is gone")?;
    expect(store.load(&other).await? == Some(b"another".to_vec()), "removing a state does not touch another")?;
    store.remove(&other).await?;
    expect(!store.describe().is_empty(), "a store can be named")
}

fn expect(holds: bool, promise: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(format!("a promise of state stores is broken: {promise}"))) }
}
