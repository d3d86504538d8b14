//! Watching changes through whatever can be survived.
//!
//! The driver resumes a change stream once per failure. Here the stream is opened anew from the last token for as long as
//! the settings allow, so that an election, a restart or a network outage is a pause and not an end.
//!
//! A driver's stream that is polled and then dropped half-way panics when it is asked for its resume token. So
//! the watcher never lends its stream out: each step is a future that owns the stream and is kept until it is done,
//! whatever becomes of the futures that waited for it.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::stream::{FusedStream, Stream};
use mongodb::{
    BoxFuture, Client, Collection, Database,
    bson::{Document, Timestamp},
    change_stream::{
        ChangeStream,
        event::{ChangeStreamEvent, OperationType, ResumeToken},
    },
    error::{Error as DriverError, RESUMABLE_CHANGE_STREAM_ERROR},
    options::{ChangeStreamOptions, FullDocumentBeforeChangeType, FullDocumentType},
};
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{
    error::{Error, ErrorKind, Result},
    retry::RetryPolicy,
};

/// What to watch, from where, and how long to hold out.
///
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::data::WatchSettings;
///
/// let inserts = WatchSettings::default().with_pipeline([doc! { "$match": { "operationType": "insert" } }]);
/// assert_eq!(inserts.pipeline.len(), 1);
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct WatchSettings {
    /// Stages after `$changeStream`. They must keep `_id`. Default: none.
    pub pipeline: Vec<Document>,
    /// Where to begin. Default: now.
    pub start: WatchStart,
    /// What an update brings of the document after it. Default: nothing but the changed fields.
    pub full_document: Option<FullDocumentType>,
    /// What a change brings of the document before it. Server 6.0, on collections with pre-images. Default: nothing.
    pub full_document_before_change: Option<FullDocumentBeforeChangeType>,
    /// Whether events for indexes, `create`, `modify` and so on are sent too. Server 6.0. Default false.
    pub show_expanded_events: bool,
    /// Events that the server sends at a time at most. Default: as many as fit.
    pub batch_size: Option<u32>,
    /// How long the server waits for a change before it answers that there is none; also how old the resume token of a
    /// quiet stream gets. Default 1 s.
    pub max_await_time: Duration,
    /// What to do when what is watched is dropped or renamed. Default [`OnInvalidate::End`].
    pub on_invalidate: OnInvalidate,
    /// How to open the stream again after a failure. The attempts and the deadline count from the first failure and begin
    /// anew with every answer. Default: up to 5 minutes, waits of up to 10 s, any number of attempts.
    pub retry: RetryPolicy,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self {
            pipeline: Vec::new(),
            start: WatchStart::Now,
            full_document: None,
            full_document_before_change: None,
            show_expanded_events: false,
            batch_size: None,
            max_await_time: Duration::from_secs(1),
            on_invalidate: OnInvalidate::End,
            retry: RetryPolicy::default().with_max_attempts(u32::MAX).with_deadline(Duration::from_secs(300)),
        }
    }
}

impl WatchSettings {
    /// Sets the stages after `$changeStream`.
    #[must_use]
    pub fn with_pipeline(mut self, stages: impl IntoIterator<Item = Document>) -> Self {
        self.pipeline = stages.into_iter().collect();
        self
    }

    /// Sets where to begin.
    #[must_use]
    pub fn with_start(mut self, start: WatchStart) -> Self {
        self.start = start;
        self
    }

    /// Sets what an update brings of the document after it.
    #[must_use]
    pub fn with_full_document(mut self, kind: FullDocumentType) -> Self {
        self.full_document = Some(kind);
        self
    }

    /// Sets what a change brings of the document before it.
    #[must_use]
    pub fn with_full_document_before_change(mut self, kind: FullDocumentBeforeChangeType) -> Self {
        self.full_document_before_change = Some(kind);
        self
    }

    /// Asks for the events that were added in server 6.0 too.
    #[must_use]
    pub fn with_expanded_events(mut self) -> Self {
        self.show_expanded_events = true;
        self
    }

    /// Sets how many events the server sends at a time at most.
    #[must_use]
    pub fn with_batch_size(mut self, events: u32) -> Self {
        self.batch_size = Some(events);
        self
    }

    /// Sets how long the server waits for a change before it answers that there is none.
    #[must_use]
    pub fn with_max_await_time(mut self, time: Duration) -> Self {
        self.max_await_time = time;
        self
    }

    /// Sets what to do when what is watched is dropped or renamed.
    #[must_use]
    pub fn with_on_invalidate(mut self, choice: OnInvalidate) -> Self {
        self.on_invalidate = choice;
        self
    }

    /// Sets how to open the stream again after a failure.
    #[must_use]
    pub fn with_retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    fn options(&self, after: Option<&ResumeToken>) -> ChangeStreamOptions {
        let mut options = ChangeStreamOptions::default();
        options.full_document = self.full_document.clone();
        options.full_document_before_change = self.full_document_before_change.clone();
        options.show_expanded_events = self.show_expanded_events.then_some(true);
        options.batch_size = self.batch_size;
        options.max_await_time = Some(self.max_await_time);
        match (after, &self.start) {
            // `startAfter` takes every token that `resumeAfter` takes, and those of an invalidation too.
            (Some(token), _) | (None, WatchStart::After(token)) => options.start_after = Some(token.clone()),
            (None, WatchStart::At(time)) => options.start_at_operation_time = Some(*time),
            (None, WatchStart::Now) => {}
        }
        options
    }
}

/// Where a watcher begins.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum WatchStart {
    /// With the next change.
    Now,
    /// With the first change after the one that this token belongs to, as
    /// [`ChangeWatcher::resume_token`] gave it, in this process or in an earlier one.
    After(ResumeToken),
    /// With the first change at or after this cluster time.
    At(Timestamp),
}

/// What a watcher does when the collection or database that it watches is dropped or renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OnInvalidate {
    /// It yields the `invalidate` event and ends, as MongoDB's own streams do.
    End,
    /// It yields the `invalidate` event and goes on: when the name comes to life again, its changes are seen.
    Reopen,
}

/// A step under way owns what it works on and gives it back with its result.
type StepInFlight<T> = BoxFuture<'static, (Box<Core<T>>, Step<T>)>;

/// A stream of changes that outlives failures.
///
/// Made by `watch_changes` of [`CollectionExt`](super::CollectionExt), [`DatabaseExt`](super::DatabaseExt) and
/// [`ClientExt`](super::ClientExt). Read it with [`next_change`](Self::next_change) or as a [`Stream`].
///
/// Every change is seen, in order. After a failure none is left out and none is repeated: the stream goes on
/// behind the last change that it yielded. What is *processed* twice after a restart of the host depends on when the
/// host stores [`resume_token`](Self::resume_token): store it with the outcome of the change.
///
/// The watcher ends with `None` when its [`CancellationToken`] is cancelled, or after an invalidation under
/// [`OnInvalidate::End`]; it ends with an error when a failure cannot be survived, and the token remains
/// readable then.
pub struct ChangeWatcher<T: DeserializeOwned> {
    /// `None` once the watcher has ended.
    step: Option<StepInFlight<T>>,
    token: Option<ResumeToken>,
    cancelled: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

/// Opens a stream on whatever is watched.
pub(super) type Open<T> =
    Arc<dyn Fn(Vec<Document>, ChangeStreamOptions) -> BoxFuture<'static, mongodb::error::Result<Events<T>>> + Send + Sync>;

type Events<T> = ChangeStream<ChangeStreamEvent<T>>;

pub(super) fn of_collection<T>(collection: Collection<T>) -> Open<T>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    Arc::new(move |pipeline, options| {
        let collection = collection.clone();
        Box::pin(async move { collection.watch().pipeline(pipeline).with_options(options).await })
    })
}

pub(super) fn of_database(database: Database) -> Open<Document> {
    Arc::new(move |pipeline, options| {
        let database = database.clone();
        Box::pin(async move { database.watch().pipeline(pipeline).with_options(options).await })
    })
}

pub(super) fn of_client(client: Client) -> Open<Document> {
    Arc::new(move |pipeline, options| {
        let client = client.clone();
        Box::pin(async move { client.watch().pipeline(pipeline).with_options(options).await })
    })
}

struct Core<T: DeserializeOwned> {
    open: Open<T>,
    settings: WatchSettings,
    /// `None` when it has to be opened (again).
    events: Option<Events<T>>,
    token: Option<ResumeToken>,
    invalidated: bool,
    failing: Option<Failing>,
}

/// A run of failures without an answer between them.
struct Failing {
    since: Instant,
    attempts: u32,
}

enum Step<T> {
    Change(Box<ChangeStreamEvent<T>>),
    /// Nothing changed; the token may have moved on.
    Quiet,
    Ended,
    Failed(Error),
}

impl<T> ChangeWatcher<T>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    pub(super) async fn open(open: Open<T>, settings: WatchSettings) -> Result<Self> {
        let events = open(settings.pipeline.clone(), settings.options(None)).await.map_err(classify)?;
        let token = events.resume_token();
        let core = Core { open, settings, events: Some(events), token, invalidated: false, failing: None };
        let token = core.token.clone();
        Ok(Self { step: Some(next_step(Box::new(core))), token, cancelled: None })
    }

    /// Ends the watcher when `cancel` is cancelled: the stream then yields `None`, and the cursor is closed on the server.
    #[must_use]
    pub fn with_cancellation(mut self, cancel: CancellationToken) -> Self {
        self.cancelled = Some(Box::pin(cancel.cancelled_owned()));
        self
    }

    /// The next change; `None` when the watcher has ended.
    ///
    /// Waits as long as nothing changes.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the oplog no longer reaches back to the resume token, [`ErrorKind::Unauthorized`],
    /// [`ErrorKind::InvalidInput`] for an event that does not fit `T` or a pipeline that the server refuses, and
    /// whatever failure lasted longer than [`WatchSettings::retry`] allows. The watcher has then ended.
    ///
    /// # Cancel safety
    /// Cancel safe: a dropped future loses no change, so it can stand in a `select!`.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn example(mut changes: mongo_core::data::ChangeWatcher<mongo_core::bson::Document>) -> mongo_core::Result<()> {
    /// let mut tick = tokio::time::interval(std::time::Duration::from_secs(10));
    /// loop {
    ///     tokio::select! {
    ///         change = changes.next_change() => match change? {
    ///             Some(change) => println!("{:?}", change.operation_type),
    ///             None => break,
    ///         },
    ///         _ = tick.tick() => println!("would resume at {:?}", changes.resume_token()),
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub async fn next_change(&mut self) -> Result<Option<ChangeStreamEvent<T>>> {
        poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await.transpose()
    }
}

impl<T: DeserializeOwned> ChangeWatcher<T> {
    /// Where a new watcher has to start to see exactly what this one has not yet yielded.
    ///
    /// It moves on with every change, and on a quiet stream about once every
    /// [`max_await_time`](WatchSettings::max_await_time) while the watcher is being polled, so that a stored token does
    /// not grow older than the oplog. `None` only before the first answer of servers that send no token with it.
    pub fn resume_token(&self) -> Option<ResumeToken> {
        self.token.clone()
    }
}

impl<T> Stream for ChangeWatcher<T>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    type Item = Result<ChangeStreamEvent<T>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.cancelled.as_mut().is_some_and(|cancelled| cancelled.as_mut().poll(context).is_ready()) {
            this.cancelled = None;
            this.step = None;
        }
        loop {
            let Some(step) = &mut this.step else { return Poll::Ready(None) };
            let (core, outcome) = ready!(step.as_mut().poll(context));
            if core.token.is_some() {
                this.token.clone_from(&core.token);
            }
            this.step = None;
            match outcome {
                Step::Change(event) => {
                    this.step = Some(next_step(core));
                    return Poll::Ready(Some(Ok(*event)));
                }
                Step::Quiet => this.step = Some(next_step(core)),
                Step::Ended => return Poll::Ready(None),
                Step::Failed(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

impl<T> FusedStream for ChangeWatcher<T>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    fn is_terminated(&self) -> bool {
        self.step.is_none()
    }
}

impl<T: DeserializeOwned> fmt::Debug for ChangeWatcher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangeWatcher").field("ended", &self.step.is_none()).finish_non_exhaustive()
    }
}

/// Does nothing until it is polled: nothing is read ahead of what the caller asks for.
fn next_step<T>(mut core: Box<Core<T>>) -> BoxFuture<'static, (Box<Core<T>>, Step<T>)>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    Box::pin(async move {
        let step = core.step().await.unwrap_or_else(Step::Failed);
        (core, step)
    })
}

impl<T> Core<T>
where
    T: DeserializeOwned + Unpin + Send + Sync + 'static,
{
    async fn step(&mut self) -> Result<Step<T>> {
        loop {
            if self.invalidated {
                if self.settings.on_invalidate == OnInvalidate::End {
                    return Ok(Step::Ended);
                }
                self.invalidated = false;
                self.events = None;
            }
            let Some(events) = &mut self.events else {
                let options = self.settings.options(self.token.as_ref());
                match (self.open)(self.settings.pipeline.clone(), options).await {
                    Ok(events) => self.events = Some(events),
                    Err(error) => self.survive(error).await?,
                }
                continue;
            };
            match events.next_if_any().await {
                Ok(event) => {
                    // Asked for only now, when the stream is at rest.
                    let token = events.resume_token();
                    let alive = events.is_alive();
                    if token.is_some() {
                        self.token = token;
                    }
                    self.failing = None;
                    match event {
                        Some(event) => {
                            self.invalidated = event.operation_type == OperationType::Invalidate;
                            return Ok(Step::Change(Box::new(event)));
                        }
                        None if alive => return Ok(Step::Quiet),
                        // The server has closed the cursor without saying why.
                        None => {
                            self.events = None;
                            self.wait(Error::new(ErrorKind::Unavailable, "the server closed the change stream")).await?;
                        }
                    }
                }
                Err(error) => {
                    self.events = None;
                    self.survive(error).await?;
                }
            }
        }
    }

    /// Waits before the stream is opened again, or returns the error when that would not help.
    async fn survive(&mut self, error: DriverError) -> Result<()> {
        let resumable = error.contains_label(RESUMABLE_CHANGE_STREAM_ERROR);
        let error = classify(error);
        // CursorNotFound, CursorKilled: the stream is gone, its history is not.
        let lost_cursor = matches!(error.server_code(), Some(43 | 237));
        let transient = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
        if !(resumable || lost_cursor || transient) {
            return Err(error);
        }
        // Without a token or a start the stream would begin anew at a later time, and changes would be left out.
        if self.token.is_none() && self.settings.start == WatchStart::Now {
            return Err(error.wrap("the change stream failed before the server told where it was"));
        }
        self.wait(error).await
    }

    async fn wait(&mut self, error: Error) -> Result<()> {
        let failing = self.failing.get_or_insert_with(|| Failing { since: Instant::now(), attempts: 0 });
        failing.attempts = failing.attempts.saturating_add(1);
        let policy = &self.settings.retry;
        if failing.attempts >= policy.max_attempts || failing.since.elapsed() >= policy.deadline {
            return Err(error.wrap("the change stream could not be resumed").with_context("attempts", failing.attempts));
        }
        tracing::warn!(attempt = failing.attempts, kind = ?error.kind(), "change stream failed and is being resumed");
        // Full jitter, as in `retry`.
        tokio::time::sleep(policy.delay_ceiling(failing.attempts).mul_f64(fastrand::f64())).await;
        Ok(())
    }
}

fn classify(error: DriverError) -> Error {
    let error = Error::from(error);
    let (kind, message) = match error.server_code() {
        Some(40573) => (ErrorKind::Unsupported, "changes can be watched on replica sets and sharded clusters only"),
        // InvalidResumeToken, ChangeStreamFatalError: the token is of another stream, or the pipeline has changed it.
        Some(260 | 280) => (ErrorKind::InvalidInput, "the change stream cannot resume with this token and pipeline"),
        // ChangeStreamHistoryLost.
        Some(286) => (ErrorKind::NotFound, "the oplog no longer reaches back to where the change stream should resume"),
        // An event was read, and did not become a `T`.
        None if error.kind() == ErrorKind::CorruptData => {
            (ErrorKind::InvalidInput, "a change does not fit the type that it is read as")
        }
        _ => return error,
    };
    Error::new(kind, message).with_source(error)
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{self, doc};

    use super::*;

    fn token(data: &str) -> ResumeToken {
        bson::deserialize_from_document(doc! { "_data": data }).unwrap()
    }

    #[test]
    fn a_stream_starts_behind_the_last_token_whatever_the_settings_say() {
        let settings = WatchSettings::default().with_start(WatchStart::After(token("first")));
        assert_eq!(settings.options(None).start_after, Some(token("first")));
        assert_eq!(settings.options(Some(&token("later"))).start_after, Some(token("later")));
        let time = Timestamp { time: 7, increment: 1 };
        let settings = WatchSettings::default().with_start(WatchStart::At(time));
        assert_eq!(settings.options(None).start_at_operation_time, Some(time));
        let resumed = settings.options(Some(&token("later")));
        assert_eq!((resumed.start_after, resumed.start_at_operation_time), (Some(token("later")), None));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_end_at_the_deadline() {
        let open: Open<Document> = Arc::new(|_, _| {
            Box::pin(async { Err(DriverError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))) })
        });
        let settings = WatchSettings::default()
            .with_retry(RetryPolicy::default().with_max_attempts(u32::MAX).with_deadline(Duration::from_secs(30)));
        let core = Core { open, settings, events: None, token: Some(token("here")), invalidated: false, failing: None };
        let began = Instant::now();
        let mut watcher = ChangeWatcher { step: Some(next_step(Box::new(core))), token: None, cancelled: None };
        let error = watcher.next_change().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!((30..=40).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
        assert_eq!(watcher.resume_token(), Some(token("here")));
        assert!(watcher.next_change().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_failure_before_the_first_token_is_not_survived() {
        let open: Open<Document> = Arc::new(|_, _| {
            Box::pin(async { Err(DriverError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))) })
        });
        let core =
            Core { open, settings: WatchSettings::default(), events: None, token: None, invalidated: false, failing: None };
        let mut watcher = ChangeWatcher { step: Some(next_step(Box::new(core))), token: None, cancelled: None };
        assert!(watcher.next_change().await.is_err());
    }

    #[tokio::test]
    async fn cancellation_ends_a_watcher_that_waits() {
        let open: Open<Document> = Arc::new(|_, _| Box::pin(std::future::pending()));
        let core = Core {
            open,
            settings: WatchSettings::default(),
            events: None,
            token: Some(token("here")),
            invalidated: false,
            failing: None,
        };
        let cancel = CancellationToken::new();
        let mut watcher = ChangeWatcher { step: Some(next_step(Box::new(core))), token: None, cancelled: None }
            .with_cancellation(cancel.clone());
        let waiting = tokio::spawn(async move { watcher.next_change().await });
        cancel.cancel();
        assert!(waiting.await.unwrap().unwrap().is_none());
    }
}
