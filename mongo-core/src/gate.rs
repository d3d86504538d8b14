//! A gate before background work, so that it yields to what cannot wait.
//!
//! Backups, restores and migrations ask before each batch that they read or write. Who answers is the host's: a workload manager, or anything that knows
//! whether the deployment has time.

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    CancellationToken,
    error::{Error, Result},
};

/// Decides whether background work may go on now.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use mongo_core::{CancellationToken, gate::{Background, Gate, Verdict}};
///
/// /// Nothing in the background from eight to eight.
/// #[derive(Debug)]
/// struct AtNight;
///
/// impl Gate for AtNight {
///     fn check(&self, work: &str) -> Verdict {
///         # let hour = 3;
///         if (8..20).contains(&hour) { Verdict::Hold(Duration::from_secs(1)) } else { Verdict::Proceed }
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_core::Result<()> {
/// let backup = Background::new(Arc::new(AtNight), "backup");
/// backup.pass(&CancellationToken::new()).await?;
/// # Ok(()) }
/// ```
pub trait Gate: fmt::Debug + Send + Sync + 'static {
    /// Whether `work`, as `"backup"`, may do a little more. It is asked before each batch, by several tasks at once, and answers at once.
    fn check(&self, work: &str) -> Verdict;
}

/// What a [`Gate`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Go on.
    Proceed,
    /// Not now: ask again after so long.
    Hold(Duration),
}

/// Work that goes through a [`Gate`]. Clones share it.
#[derive(Clone, Debug)]
pub struct Background {
    gate: Option<Arc<dyn Gate>>,
    work: &'static str,
}

impl Background {
    /// Work of this name, which asks `gate`.
    pub fn new(gate: Arc<dyn Gate>, work: &'static str) -> Self {
        Self { gate: Some(gate), work }
    }

    /// Work that asks nobody.
    pub fn ungated() -> Self {
        Self { gate: None, work: "" }
    }

    /// Waits until a little more may be done, [`LONGEST_HOLD`] at most: work that stands still loses its cursors, its sessions and its place in the oplog, and never ends. Gives how long it
    /// was held.
    ///
    /// # Errors
    /// `Cancelled` by the token.
    ///
    /// # Cancel safety
    /// It may be dropped and called again.
    pub async fn pass(&self, cancel: &CancellationToken) -> Result<Duration> {
        let Some(gate) = &self.gate else { return Ok(Duration::ZERO) };
        let began = Instant::now();
        loop {
            if cancel.is_cancelled() {
                return Err(Error::cancelled());
            }
            let held = began.elapsed();
            let wait = match gate.check(self.work) {
                Verdict::Hold(wait) if held < LONGEST_HOLD => wait.max(SHORTEST_HOLD).min(LONGEST_HOLD - held),
                _ => return Ok(held),
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::cancelled()),
                () = sleep(wait) => {}
            }
        }
    }
}

/// How long a [`Gate`] can hold one batch.
pub const LONGEST_HOLD: Duration = Duration::from_secs(10);
/// Whoever says to ask again at once is not asked in a circle.
const SHORTEST_HOLD: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    /// Holds so often, so long.
    #[derive(Debug)]
    struct Holds(AtomicU32, Duration);

    impl Gate for Holds {
        fn check(&self, work: &str) -> Verdict {
            assert_eq!(work, "test");
            match self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
                Ok(_) => Verdict::Hold(self.1),
                Err(_) => Verdict::Proceed,
            }
        }
    }

    fn held(times: u32, each: Duration) -> Background {
        Background::new(Arc::new(Holds(AtomicU32::new(times), each)), "test")
    }

    #[tokio::test(start_paused = true)]
    async fn work_is_held_as_long_as_it_is_told_and_no_longer_than_ten_seconds() {
        let cancel = CancellationToken::new();
        assert_eq!(Background::ungated().pass(&cancel).await.unwrap(), Duration::ZERO);
        assert_eq!(held(0, Duration::ZERO).pass(&cancel).await.unwrap(), Duration::ZERO);
        assert_eq!(held(3, Duration::from_secs(2)).pass(&cancel).await.unwrap(), Duration::from_secs(6));
        assert_eq!(held(u32::MAX, Duration::from_secs(4)).pass(&cancel).await.unwrap(), LONGEST_HOLD);
        assert_eq!(held(u32::MAX, Duration::MAX).pass(&cancel).await.unwrap(), LONGEST_HOLD);
        assert!(held(u32::MAX, Duration::ZERO).pass(&cancel).await.unwrap() >= LONGEST_HOLD);
        // The last hold is shorter than the shortest.
        let odd = held(u32::MAX, Duration::from_micros(9_999_500)).pass(&cancel).await.unwrap();
        assert!(odd >= LONGEST_HOLD && odd < LONGEST_HOLD + Duration::from_millis(5), "{odd:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_held_can_be_cancelled() {
        let cancel = CancellationToken::new();
        let background = held(u32::MAX, Duration::from_secs(5));
        let (result, ()) = tokio::join!(background.pass(&cancel), async {
            sleep(Duration::from_secs(1)).await;
            cancel.cancel();
        });
        assert_eq!(result.unwrap_err().kind(), crate::ErrorKind::Cancelled);
        assert!(background.pass(&cancel).await.is_err(), "also before it is asked");
    }
}
