//! Several operations at once.

use std::{num::NonZeroUsize, panic::AssertUnwindSafe};

use futures_util::{
    FutureExt,
    stream::{FuturesUnordered, StreamExt},
};

use crate::error::{Error, Result};

/// What a failed operation means to those that have not begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OnFailure {
    /// Nothing: all operations run.
    #[default]
    Continue,
    /// They are not begun, and their result is [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled). Those that
    /// are running end as they would.
    StopStarting,
}

/// Runs operations of any kind at once, at most `limit` at a time, and returns their results in order of submission.
///
/// One failure leaves the others alone, unless `on_failure` says otherwise. An operation that panics does not take the
/// others with it: its result is [`ErrorKind::Internal`](crate::ErrorKind::Internal). Operations are taken
/// from the iterator as there is room, so it may be longer than what should exist at once, but it must end.
///
/// The operations run within the task that awaits this function: they may borrow, and they share one core. Work that
/// computes much between its awaits should spawn a task of its own.
///
/// # Errors
/// None of its own: every operation's result is in the vector.
///
/// # Cancel safety
/// Dropping the future drops the operations that are running, each as cancel-safe as it is by itself; the results of
/// those that had ended are lost.
///
/// # Examples
/// Operations of different kinds have futures of different types, so they are boxed:
///
/// ```no_run
/// # async fn example(database: mongo_core::mongodb::Database) -> mongo_core::Result<()> {
/// use std::num::NonZeroUsize;
///
/// use mongo_core::Result;
/// use mongo_core::bson::{Document, doc};
/// use mongo_core::data::{OnFailure, run_concurrently};
/// use mongo_core::mongodb::BoxFuture;
///
/// let users = database.collection::<Document>("users");
/// let orders = database.collection::<Document>("orders");
/// let operations: Vec<BoxFuture<'_, Result<u64>>> = vec![
///     Box::pin(async { Ok(users.count_documents(doc! {}).await?) }),
///     Box::pin(async { Ok(orders.delete_many(doc! { "draft": true }).await?.deleted_count) }),
///     Box::pin(async { Ok(orders.update_many(doc! {}, doc! { "$set": { "seen": true } }).await?.modified_count) }),
/// ];
/// let limit = NonZeroUsize::MIN.saturating_add(7);
/// for (position, result) in run_concurrently(limit, operations, OnFailure::Continue).await.iter().enumerate() {
///     match result {
///         Ok(documents) => println!("{position}: {documents} documents"),
///         Err(error) => println!("{position}: {error}"),
///     }
/// }
/// # Ok(()) }
/// ```
pub async fn run_concurrently<F, T>(
    limit: NonZeroUsize,
    operations: impl IntoIterator<Item = F, IntoIter: Send> + Send,
    on_failure: OnFailure,
) -> Vec<Result<T>>
where
    F: Future<Output = Result<T>> + Send,
    T: Send,
{
    let mut waiting = operations.into_iter();
    let mut running = FuturesUnordered::new();
    let mut results: Vec<Option<Result<T>>> = Vec::new();
    let mut stopped = false;
    loop {
        while !stopped && running.len() < limit.get() {
            let Some(operation) = waiting.next() else { break };
            let position = results.len();
            results.push(None);
            // What a panic leaves half done is the operation's own state, which is dropped with it.
            running.push(AssertUnwindSafe(operation).catch_unwind().map(move |outcome| (position, outcome)));
        }
        let Some((position, outcome)) = running.next().await else { break };
        let result = outcome.unwrap_or_else(|_| Err(Error::internal("an operation panicked")));
        stopped |= on_failure == OnFailure::StopStarting && result.is_err();
        if let Some(slot) = results.get_mut(position) {
            *slot = Some(result);
        }
    }
    results.extend(waiting.map(|_| None));
    results
        .into_iter()
        .map(|result| result.unwrap_or_else(|| Err(Error::cancelled().with_context("reason", "an earlier operation failed"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use mongodb::BoxFuture;

    use super::*;
    use crate::error::ErrorKind;

    fn limit(limit: usize) -> NonZeroUsize {
        NonZeroUsize::new(limit).unwrap()
    }

    fn explode() -> usize {
        panic!("on purpose")
    }

    fn kinds(results: &[Result<usize>]) -> Vec<std::result::Result<usize, ErrorKind>> {
        results.iter().map(|result| result.as_ref().copied().map_err(Error::kind)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn results_come_in_order_of_submission() {
        let operations = (0..10).map(|n| async move {
            tokio::time::sleep(Duration::from_millis(10 * (10 - n as u64))).await;
            Ok(n)
        });
        let results = run_concurrently(limit(4), operations, OnFailure::Continue).await;
        assert_eq!(kinds(&results), (0..10).map(Ok).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_the_limit_run_at_once() {
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let operations = (0..50).map(|_| {
            let (running, most) = (&running, &most);
            async move {
                let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(1)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
        });
        let results = run_concurrently(limit(8), operations, OnFailure::Continue).await;
        assert_eq!((results.len(), most.load(Ordering::SeqCst)), (50, 8));
    }

    #[tokio::test]
    async fn a_failure_and_a_panic_leave_the_others_alone() {
        let operations: Vec<BoxFuture<'_, Result<usize>>> = vec![
            Box::pin(async { Ok(1) }),
            Box::pin(async { Err(Error::new(ErrorKind::NotFound, "nothing there")) }),
            Box::pin(async { Ok(explode()) }),
            Box::pin(async { Ok(4) }),
        ];
        let results = run_concurrently(limit(2), operations, OnFailure::Continue).await;
        assert_eq!(kinds(&results), [Ok(1), Err(ErrorKind::NotFound), Err(ErrorKind::Internal), Ok(4)]);
    }

    #[tokio::test]
    async fn stopping_begins_nothing_after_a_failure_and_still_answers_for_all() {
        let begun = AtomicUsize::new(0);
        let operations = (0..5).map(|n| {
            let begun = &begun;
            async move {
                begun.fetch_add(1, Ordering::SeqCst);
                if n == 1 { Err(Error::invalid("no")) } else { Ok(n) }
            }
        });
        let results = run_concurrently(limit(1), operations, OnFailure::StopStarting).await;
        let cancelled = Err(ErrorKind::Cancelled);
        assert_eq!(kinds(&results), [Ok(0), Err(ErrorKind::InvalidInput), cancelled, cancelled, cancelled]);
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn nothing_to_do_is_done_at_once() {
        let none: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        assert!(run_concurrently(limit(1), none, OnFailure::Continue).await.is_empty());
    }
}
