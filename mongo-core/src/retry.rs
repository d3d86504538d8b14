//! Trying again: how long to wait, how often, and when to stop because everybody is trying again.
//!
//! The driver already retries a read or a retryable write once on its own, and a server that calls itself overloaded
//! twice. [`retry`] stands around whole operations and sees only what is left after that. It does not multiply the
//! driver's attempts: for an error that the driver has retried for overload it waits at least the policy's longest
//! delay, and every retry has to be paid for from a [`RetryBudget`], so that a struggling deployment sees at most a
//! fixed share of extra load.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, ErrorKind, Result},
    lock::lock,
};

/// How to retry: exponential backoff with full jitter, within a number of attempts and a deadline.
///
/// The wait before retry *n* (from 1) is uniform in `0 ..= min(max_delay, initial_delay · 2^(n-1))`. Full jitter spreads
/// the retries of many clients as widely as possible; see "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
///
/// ```
/// use std::time::Duration;
/// use mongo_core::RetryPolicy;
///
/// let policy = RetryPolicy::default().with_max_attempts(3).with_deadline(Duration::from_secs(10));
/// assert!(policy.delay_ceiling(1) <= policy.delay_ceiling(2));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct RetryPolicy {
    /// Ceiling of the first wait. Default 100 ms.
    pub initial_delay: Duration,
    /// Ceiling of every wait. Default 10 s.
    pub max_delay: Duration,
    /// Attempts in all, the first included; at least 1. Default 5.
    pub max_attempts: u32,
    /// No attempt begins later than this after the first one began. Default 60 s.
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            initial_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(10),
            max_attempts: 5,
            deadline: Duration::from_secs(60),
        }
    }
}

impl RetryPolicy {
    /// Tries once.
    pub fn never() -> Self {
        Self::default().with_max_attempts(1)
    }

    /// Sets the ceiling of the first wait.
    #[must_use]
    pub fn with_initial_delay(mut self, delay: Duration) -> Self {
        self.initial_delay = delay;
        self
    }

    /// Sets the ceiling of every wait.
    #[must_use]
    pub fn with_max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// Sets the number of attempts in all; 0 counts as 1.
    #[must_use]
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts.max(1);
        self
    }

    /// Sets the time after which no attempt begins.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The longest wait before retry `retry`, counted from 1.
    pub fn delay_ceiling(&self, retry: u32) -> Duration {
        let doublings = retry.saturating_sub(1).min(31);
        self.initial_delay.saturating_mul(1 << doublings).min(self.max_delay)
    }

    fn delay(&self, retry: u32, error: &Error) -> Duration {
        let jittered = self.delay_ceiling(retry).mul_f64(fastrand::f64());
        if error.has_label(mongodb::error::SYSTEM_OVERLOADED_ERROR) {
            // The driver has retried this twice already, with its own backoff.
            return jittered.max(self.max_delay);
        }
        jittered
    }
}

/// A bound on the share of extra load that retries may make, shared by all the users of a deployment.
///
/// Every first attempt puts `ratio` of a token in, every retry takes a whole one out, and up to `reserve` are kept for
/// quiet times. With a ratio of 0.1 a deployment that fails every request sees at most 10 % more of them, instead of a
/// multiple by the number of attempts: fixed attempt counts turn a short overload into a long one.
#[derive(Clone, Debug)]
pub struct RetryBudget(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    ratio: f64,
    reserve: f64,
    tokens: Mutex<f64>,
}

impl RetryBudget {
    /// A budget that starts with `reserve` tokens.
    pub fn new(ratio: f64, reserve: u32) -> Self {
        let reserve = f64::from(reserve);
        Self(Arc::new(Budget { ratio: ratio.max(0.0), reserve, tokens: Mutex::new(reserve) }))
    }

    /// Whether a retry can be paid for now; takes the token if so.
    pub fn withdraw(&self) -> bool {
        let mut tokens = self.tokens();
        if *tokens < 1.0 {
            return false;
        }
        *tokens -= 1.0;
        true
    }

    /// Puts in what a first attempt earns. [`retry`] does it by itself.
    pub fn deposit(&self) {
        let mut tokens = self.tokens();
        *tokens = (*tokens + self.0.ratio).min(self.0.reserve.max(1.0));
    }

    fn tokens(&self) -> std::sync::MutexGuard<'_, f64> {
        lock(&self.0.tokens)
    }
}

impl Default for RetryBudget {
    /// 20 % extra load, 10 retries in reserve.
    fn default() -> Self {
        Self::new(0.2, 10)
    }
}

/// Runs `operation` until it succeeds, fails for good, or may not be tried again.
///
/// The operation must be idempotent: an attempt whose reply was lost may have taken effect. It gets the number of the
/// attempt, from 1.
///
/// # Errors
/// The last attempt's own error, unless [`Error::is_retryable`]; also when attempts, deadline or budget are exhausted
/// (told in the error's context). [`ErrorKind::Cancelled`] as soon as `cancel` is cancelled, also during a wait.
///
/// # Cancel safety
/// Dropping the future drops the attempt in flight and starts no other.
///
/// # Examples
/// ```no_run
/// # async fn f(collection: mongo_core::mongodb::Collection<mongo_core::bson::Document>) -> mongo_core::Result<()> {
/// use mongo_core::{RetryBudget, RetryPolicy, retry};
/// use tokio_util::sync::CancellationToken;
///
/// let budget = RetryBudget::default();
/// let count = retry(&RetryPolicy::default(), &budget, &CancellationToken::new(), |_| async {
///     Ok(collection.estimated_document_count().await?)
/// })
/// .await?;
/// # Ok(()) }
/// ```
pub async fn retry<T, F, Fut>(
    policy: &RetryPolicy,
    budget: &RetryBudget,
    cancel: &CancellationToken,
    mut operation: F,
) -> Result<T>
where
    F: FnMut(u32) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let started = Instant::now();
    budget.deposit();
    let mut attempt = 1;
    loop {
        let error = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(Error::cancelled()),
            result = operation(attempt) => match result {
                Ok(value) => return Ok(value),
                Err(error) => error,
            },
        };
        if !error.is_retryable() {
            return Err(error);
        }
        if attempt >= policy.max_attempts.max(1) {
            return Err(given_up(error, attempt, "attempts used up"));
        }
        let delay = policy.delay(attempt, &error);
        if started.elapsed() + delay > policy.deadline {
            return Err(given_up(error, attempt, "deadline reached"));
        }
        if !budget.withdraw() {
            return Err(given_up(error, attempt, "retry budget spent"));
        }
        tracing::warn!(attempt, ?delay, kind = ?error.kind(), "retrying after a failure");
        tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(Error::cancelled()),
            () = tokio::time::sleep(delay) => {}
        }
        attempt += 1;
    }
}

fn given_up(error: Error, attempts: u32, why: &'static str) -> Error {
    debug_assert_eq!(error.kind(), ErrorKind::Unavailable);
    if attempts == 1 && why == "attempts used up" {
        return error;
    }
    error.with_context("attempts", attempts).with_context("gave up because", why)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    fn unavailable() -> Error {
        Error::new(ErrorKind::Unavailable, "down")
    }

    async fn attempts(policy: &RetryPolicy, budget: &RetryBudget, error: fn() -> Error) -> (u32, Error) {
        let count = AtomicU32::new(0);
        let result: Result<()> = retry(policy, budget, &CancellationToken::new(), |_| {
            count.fetch_add(1, Relaxed);
            async { Err(error()) }
        })
        .await;
        (count.into_inner(), result.unwrap_err())
    }

    #[tokio::test(start_paused = true)]
    async fn stops_at_the_number_of_attempts() {
        let policy = RetryPolicy::default().with_max_attempts(4);
        let (count, error) = attempts(&policy, &RetryBudget::default(), unavailable).await;
        assert_eq!(count, 4);
        insta::assert_snapshot!(error, @"down (attempts: 4, gave up because: attempts used up)");
    }

    #[tokio::test(start_paused = true)]
    async fn does_not_retry_what_cannot_get_better() {
        let (count, error) = attempts(&RetryPolicy::default(), &RetryBudget::default(), || Error::invalid("wrong")).await;
        assert_eq!((count, error.to_string().as_str()), (1, "wrong"));
    }

    #[tokio::test(start_paused = true)]
    async fn begins_no_attempt_after_the_deadline() {
        let policy = RetryPolicy::default().with_max_attempts(1000).with_deadline(Duration::from_secs(30));
        let started = Instant::now();
        let (_, error) = attempts(&policy, &RetryBudget::new(1.0, 10_000), unavailable).await;
        assert!(started.elapsed() <= Duration::from_secs(30));
        assert!(error.to_string().contains("deadline reached"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_spent_budget_stops_everybody() {
        let budget = RetryBudget::new(0.1, 3);
        let policy = RetryPolicy::default().with_max_attempts(10).with_deadline(Duration::from_secs(1000));
        let mut total = 0;
        for _ in 0..20 {
            total += attempts(&policy, &budget, unavailable).await.0;
        }
        // 20 first attempts, 3 from the reserve, 20 · 0.1 earned.
        assert!((23..=25).contains(&total), "{total} attempts");
    }

    #[tokio::test(start_paused = true)]
    async fn cancelling_ends_a_wait_at_once() {
        let cancel = CancellationToken::new();
        let policy = RetryPolicy::default().with_initial_delay(Duration::from_secs(1000)).with_deadline(Duration::MAX);
        let canceller = cancel.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            canceller.cancel();
        });
        let result: Result<()> = retry(&policy, &RetryBudget::default(), &cancel, |_| async { Err(unavailable()) }).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn waits_grow_to_the_ceiling_and_never_overflow() {
        let policy = RetryPolicy::default();
        let ceilings: Vec<_> = (1..100).map(|retry| policy.delay_ceiling(retry)).collect();
        assert!(ceilings.is_sorted());
        assert_eq!(*ceilings.last().unwrap(), policy.max_delay);
    }
}
