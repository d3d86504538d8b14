//! A circuit breaker: stop asking a deployment that does not answer, and find out cheaply when it does again.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    clock::{Clock, SystemClock},
    error::{Error, ErrorKind, Result},
    lock::lock,
};

/// When a breaker opens and closes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct BreakerSettings {
    /// Failures in a row that open the breaker; at least 1. Default 5.
    pub failures_to_open: u32,
    /// How long it stays open before it lets a probe through. Default 10 s.
    pub open_for: Duration,
    /// How many probes may be under way at once while half open; at least 1. Default 1.
    pub probes: u32,
    /// Probes that must succeed, in a row, to close it; at least 1. Default 2.
    pub successes_to_close: u32,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self { failures_to_open: 5, open_for: Duration::from_secs(10), probes: 1, successes_to_close: 2 }
    }
}

impl BreakerSettings {
    /// Sets the failures in a row that open the breaker.
    #[must_use]
    pub fn with_failures_to_open(mut self, failures: u32) -> Self {
        self.failures_to_open = failures;
        self
    }

    /// Sets how long it stays open before a probe.
    #[must_use]
    pub fn with_open_for(mut self, duration: Duration) -> Self {
        self.open_for = duration;
        self
    }

    /// Sets how many probes may be under way at once.
    #[must_use]
    pub fn with_probes(mut self, probes: u32) -> Self {
        self.probes = probes;
        self
    }

    /// Sets how many probes in a row must succeed.
    #[must_use]
    pub fn with_successes_to_close(mut self, successes: u32) -> Self {
        self.successes_to_close = successes;
        self
    }
}

/// What a breaker does with the next call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BreakerState {
    /// Lets everything through.
    Closed,
    /// Refuses everything.
    Open,
    /// Lets a few probes through to find out.
    HalfOpen,
}

/// A circuit breaker for one deployment; clones share the state.
///
/// Only failures to reach or to be served count ([`ErrorKind::Unavailable`], [`ErrorKind::Timeout`]): a server that
/// answers "duplicate key" is well.
///
/// ```
/// use mongo_core::{CircuitBreaker, Error, ErrorKind, breaker::{BreakerSettings, BreakerState}};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let breaker = CircuitBreaker::new(BreakerSettings::default().with_failures_to_open(1));
/// let down = breaker.call(async { Err::<(), _>(Error::new(ErrorKind::Unavailable, "no answer")) }).await;
/// assert!(down.is_err());
/// assert_eq!(breaker.state(), BreakerState::Open);
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CircuitBreaker {
    settings: BreakerSettings,
    clock: Arc<dyn Clock>,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
enum Inner {
    Closed { failures: u32 },
    Open { since: Duration },
    HalfOpen { under_way: u32, successes: u32, epoch: Duration },
}

impl CircuitBreaker {
    /// A closed breaker.
    pub fn new(settings: BreakerSettings) -> Self {
        Self { settings, clock: Arc::new(SystemClock::new()), inner: Arc::new(Mutex::new(Inner::Closed { failures: 0 })) }
    }

    /// Takes the time from `clock`.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// What the next call would meet.
    pub fn state(&self) -> BreakerState {
        match *self.lock() {
            Inner::Closed { .. } => BreakerState::Closed,
            Inner::Open { since } if self.clock.monotonic() < since + self.settings.open_for => BreakerState::Open,
            Inner::Open { .. } | Inner::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Asks to make one call.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while the breaker is open, at once and without a call.
    pub fn acquire(&self) -> Result<BreakerPermit> {
        let mut inner = self.lock();
        let now = self.clock.monotonic();
        if let Inner::Open { since } = *inner {
            let reopens = since + self.settings.open_for;
            if now < reopens {
                return Err(Error::new(ErrorKind::Unavailable, "the circuit breaker is open after repeated failures")
                    .with_context("next probe in ms", (reopens - now).as_millis()));
            }
            *inner = Inner::HalfOpen { under_way: 0, successes: 0, epoch: now };
        }
        let epoch = match &mut *inner {
            Inner::HalfOpen { under_way, epoch, .. } => {
                if *under_way >= self.settings.probes.max(1) {
                    return Err(Error::new(ErrorKind::Unavailable, "the circuit breaker is waiting for a probe's outcome"));
                }
                *under_way += 1;
                Some(*epoch)
            }
            _ => None,
        };
        Ok(BreakerPermit { breaker: self.clone(), probe_of: epoch, told: false })
    }

    /// Makes one call through the breaker and tells it the outcome.
    ///
    /// # Errors
    /// Those of [`acquire`](Self::acquire), and the call's own.
    ///
    /// # Cancel safety
    /// A dropped call tells nothing and frees its place as a probe.
    pub async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let permit = self.acquire()?;
        let result = call.await;
        match &result {
            Err(error) if matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout) => permit.failed(),
            Err(error) if error.kind() == ErrorKind::Cancelled => drop(permit),
            _ => permit.succeeded(),
        }
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// Leave to make one call. Dropped without a word, it counts neither way.
#[derive(Debug)]
#[must_use = "tell the breaker how the call went"]
pub struct BreakerPermit {
    breaker: CircuitBreaker,
    probe_of: Option<Duration>,
    told: bool,
}

impl BreakerPermit {
    /// The deployment served the call.
    pub fn succeeded(mut self) {
        self.told = true;
        let mut inner = self.breaker.lock();
        match (&mut *inner, self.probe_of) {
            (Inner::Closed { failures }, _) => *failures = 0,
            (Inner::HalfOpen { under_way, successes, epoch }, Some(mine)) if *epoch == mine => {
                *under_way = under_way.saturating_sub(1);
                *successes += 1;
                if *successes >= self.breaker.settings.successes_to_close.max(1) {
                    *inner = Inner::Closed { failures: 0 };
                }
            }
            // A call from before the breaker opened says nothing about now.
            _ => {}
        }
    }

    /// The deployment could not be reached or did not serve the call.
    pub fn failed(mut self) {
        self.told = true;
        let now = self.breaker.clock.monotonic();
        let mut inner = self.breaker.lock();
        match (&mut *inner, self.probe_of) {
            (Inner::Closed { failures }, _) => {
                *failures += 1;
                if *failures >= self.breaker.settings.failures_to_open.max(1) {
                    *inner = Inner::Open { since: now };
                }
            }
            (Inner::HalfOpen { epoch, .. }, Some(mine)) if *epoch == mine => *inner = Inner::Open { since: now },
            _ => {}
        }
    }
}

impl Drop for BreakerPermit {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        if let (Inner::HalfOpen { under_way, epoch, .. }, Some(mine)) = (&mut *self.breaker.lock(), self.probe_of)
            && *epoch == mine
        {
            *under_way = under_way.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::clock::ManualClock;

    fn breaker() -> (CircuitBreaker, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH));
        let settings = BreakerSettings::default().with_failures_to_open(3);
        (CircuitBreaker::new(settings).with_clock(Arc::<ManualClock>::clone(&clock)), clock)
    }

    fn open() -> (CircuitBreaker, Arc<ManualClock>) {
        let (breaker, clock) = breaker();
        for _ in 0..3 {
            breaker.acquire().unwrap().failed();
        }
        (breaker, clock)
    }

    #[test]
    fn opens_after_failures_in_a_row_only() {
        let (breaker, _) = breaker();
        for _ in 0..10 {
            breaker.acquire().unwrap().failed();
            breaker.acquire().unwrap().failed();
            breaker.acquire().unwrap().succeeded();
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
        let (breaker, _) = open();
        assert_eq!(breaker.acquire().unwrap_err().kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn lets_one_probe_through_at_a_time_and_closes_after_two() {
        let (breaker, clock) = open();
        clock.advance(Duration::from_secs(10));
        let probe = breaker.acquire().unwrap();
        assert!(breaker.acquire().is_err(), "a second probe at once");
        probe.succeeded();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.acquire().unwrap().succeeded();
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn a_failed_probe_opens_it_again() {
        let (breaker, clock) = open();
        clock.advance(Duration::from_secs(10));
        breaker.acquire().unwrap().failed();
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn a_dropped_probe_frees_its_place() {
        let (breaker, clock) = open();
        clock.advance(Duration::from_secs(10));
        drop(breaker.acquire().unwrap());
        assert!(breaker.acquire().is_ok());
    }

    #[test]
    fn a_late_outcome_from_before_the_opening_changes_nothing() {
        let (breaker, clock) = breaker();
        let late = breaker.acquire().unwrap();
        for _ in 0..3 {
            breaker.acquire().unwrap().failed();
        }
        clock.advance(Duration::from_secs(10));
        late.succeeded();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    }

    #[tokio::test]
    async fn an_answer_that_refuses_is_an_answer() {
        let (breaker, _) = breaker();
        for _ in 0..10 {
            let _ = breaker.call(async { Err::<(), _>(Error::new(ErrorKind::Rejected, "duplicate key")) }).await;
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
