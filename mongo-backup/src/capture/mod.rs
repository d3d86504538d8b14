//! Capturing the oplog all the while, so that any second can be restored.

mod settings;

use std::{sync::Arc, time::Duration};

use mongo_core::{
    CancellationToken, Deployment, Error, ErrorKind, Result, RetryBudget, RetryPolicy,
    bson::Timestamp,
    progress::{ProgressEvent, ProgressSink},
    transfer::oplog::{Entry, Oplog, OplogRead, ReplicaSetId, position_in},
};
use serde::Serialize;
use tokio::time::Instant;

pub use self::settings::{CaptureBuilder, CaptureSettings};
use crate::{
    audit::AuditAction,
    repository::{
        Repository,
        slice::{EntrySum, OpenSlice, Stretch},
    },
};

/// Stores the oplog of a replica set in a repository as it grows, until it is cancelled.
///
/// With it, a snapshot of the set can be rolled forward to any second or oplog position that was captured: see
/// [`RestoreBuilder::at`](crate::RestoreBuilder::at). What is stored a majority holds, so no election takes it back. Every slice begins with the entry
/// with which the one before it ends: that nothing is missing can be proved years later.
///
/// Capturing goes on where an earlier capture ended, however it ended, as long as the oplog reaches back so far; else it says so, records
/// the gap, and begins anew: then a new snapshot is needed before what follows can be restored. The first capture begins where the newest
/// snapshot of the set can be rolled forward from. Elections, restarts and a lost connection are waited out.
///
/// Two captures of one set may run at the same time, for the case that one fails: they store some entries twice.
///
/// # What to grant
/// The role `backup`, or `find` on `local.oplog.rs` and `config.transactions` and `listCollections` on `admin`. The oplog should hold a day at
/// least: it is what a capture has to come back in after it stood still.
///
/// ```no_run
/// # async fn f(deployment: mongo_core::Deployment, repository: mongo_backup::Repository) -> mongo_backup::Result<()> {
/// use mongo_backup::Capture;
///
/// let stop = mongo_core::CancellationToken::new();
/// let capture = Capture::builder(&deployment, &repository).cancellation(stop.clone()).build()?;
/// let capturing = tokio::spawn(async move { capture.run().await });
/// // … the service runs …
/// stop.cancel();
/// let report = capturing.await??;
/// println!("captured up to {}", report.until.time);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Capture {
    deployment: Deployment,
    repository: Repository,
    settings: CaptureSettings,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

/// What was captured.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CaptureReport {
    /// The replica set.
    pub replica_set: ReplicaSetId,
    /// Where this capture began.
    pub from: Timestamp,
    /// How far it came: everything up to there is stored.
    pub until: Timestamp,
    /// Slices stored.
    pub slices: u64,
    /// Entries in them.
    pub entries: u64,
    /// Bytes that the archive grew by.
    pub stored_bytes: u64,
    /// Stretches that are missing because the oplog was overrun before they were read.
    pub gaps: Vec<OplogGap>,
}

/// A stretch of the oplog that was not captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OplogGap {
    /// The last entry before it.
    pub after: Timestamp,
    /// The first entry behind it.
    pub before: Timestamp,
    /// Why.
    pub reason: String,
}

impl Capture {
    /// Prepares a capture of the oplog of `deployment`.
    pub fn builder(deployment: &Deployment, repository: &Repository) -> CaptureBuilder {
        CaptureBuilder::new(deployment.clone(), repository.clone())
    }

    /// Captures until it is cancelled; then stores what has come until then, and ends.
    ///
    /// # Errors
    /// `Unsupported` for a standalone server or a sharded cluster; `Unauthorized` when the oplog may not be read; `Conflict` when the archive holds
    /// another history of this replica set. What passes by itself (`Unavailable`, `Timeout`) is waited out and is no error, once it has begun.
    ///
    /// # Cancel safety
    /// What was stored stays, and the next capture goes on behind it. Use the token to store what was read last as well.
    #[tracing::instrument(skip_all, name = "capture")]
    pub async fn run(&self) -> Result<CaptureReport> {
        let subject = [("deployment", self.deployment.topology().to_string())];
        let until = |report: &CaptureReport| Some(("until", position(report.until)));
        self.repository.recorded(AuditAction::Capture, subject, Box::pin(self.run_unrecorded()), until).await
    }

    async fn run_unrecorded(&self) -> Result<CaptureReport> {
        self.repository.make().await?;
        let oplog = Oplog::of(&self.deployment)?;
        let set = oplog.replica_set_id().await?;
        let mut running = Running::begin(self, oplog, set).await?;
        let mut trouble = Trouble::default();
        loop {
            let stopping = self.cancel.is_cancelled();
            let caught_up = if stopping {
                // What has come until now, but not at any price.
                let slow = Error::new(ErrorKind::Timeout, "the deployment or the archive does not answer");
                tokio::time::timeout(LAST_READING, running.catch_up(true)).await.unwrap_or(Err(slow))
            } else {
                running.catch_up(false).await
            };
            match caught_up {
                Ok(()) => trouble = Trouble::default(),
                Err(error) if passes(&error) && !stopping => {
                    trouble.wait(self, &error).await;
                    continue;
                }
                Err(error) if passes(&error) => {
                    self.note(format!("the last entries could not be stored, the next capture will: {}", error.report()));
                }
                Err(error) => return Err(error),
            }
            if stopping {
                return Ok(running.report);
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => {}
                () = tokio::time::sleep(self.settings.poll) => {}
            }
        }
    }

    fn note(&self, note: String) {
        tracing::warn!("{note}");
        self.progress.event(&ProgressEvent::Note(note));
    }
}

/// Whether an error is one that passes by itself.
fn passes(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout)
}

/// How long the trouble lasts.
#[derive(Default)]
struct Trouble {
    attempts: u32,
}

impl Trouble {
    async fn wait(&mut self, capture: &Capture, error: &Error) {
        if self.attempts == 0 {
            capture.note(format!("capturing stands still and will go on: {}", error.report()));
        }
        let pause = Duration::from_millis(500).saturating_mul(1 << self.attempts.min(6)).min(LONGEST_PAUSE);
        self.attempts = self.attempts.saturating_add(1);
        tokio::select! {
            () = capture.cancel.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// A capture that has begun.
struct Running<'a> {
    capture: &'a Capture,
    oplog: Oplog,
    set: ReplicaSetId,
    slice: OpenSlice,
    /// Since when the slice holds something that is not stored, and whether that is more than notes.
    unstored: Option<(Instant, bool)>,
    report: CaptureReport,
}

impl<'a> Running<'a> {
    async fn begin(capture: &'a Capture, oplog: Oplog, set: ReplicaSetId) -> Result<Self> {
        // The token ends the capture itself, not a reading in its middle.
        let oplog = oplog.with(RetryPolicy::default(), RetryBudget::default(), CancellationToken::new());
        let stored = capture.repository.stretches(set).await?;
        let mut running = Self {
            capture,
            oplog,
            set,
            slice: OpenSlice::default(),
            unstored: None,
            report: CaptureReport {
                replica_set: set,
                from: Timestamp { time: 0, increment: 0 },
                until: Timestamp { time: 0, increment: 0 },
                slices: 0,
                entries: 0,
                stored_bytes: 0,
                gaps: Vec::new(),
            },
        };
        let end = match stored.end() {
            Some(end) => Some((end.last, capture.repository.slice(set, end).await?.last_sum)),
            None => None,
        };
        running.start(end, "the oplog was overrun while nothing captured it").await?;
        running.report.from = running.report.until;
        Ok(running)
    }

    /// Begins a chain of slices: behind `end` if that entry is still there, else anew behind a gap.
    async fn start(&mut self, end: Option<(Timestamp, EntrySum)>, reason: &str) -> Result<()> {
        if let Some((last, sum)) = end
            && self.open_at(last, Some(sum)).await?
        {
            return Ok(());
        }
        let beginning = self.new_beginning(end.map(|(last, _)| last)).await?;
        if let Some((last, _)) = end {
            let gap = Stretch { first: last, last: beginning };
            self.capture.repository.store_gap(self.set, gap, reason).await?;
            self.capture.note(format!(
                "{reason}: what happened from {} to {} cannot be restored; make a new snapshot now, so that what follows can",
                position(last),
                position(beginning)
            ));
            self.report.gaps.push(OplogGap { after: last, before: beginning, reason: reason.to_owned() });
        }
        if self.open_at(beginning, None).await? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unavailable, "the oplog is overrun faster than it can be read: make it larger"))
    }

    /// Where to begin when there is nothing to go on with: where the newest snapshot can be rolled forward from, if the oplog reaches back so far,
    /// else where the oldest open transaction begins.
    async fn new_beginning(&self, after: Option<Timestamp>) -> Result<Timestamp> {
        let snapshots = self.capture.repository.snapshots().await?.snapshots;
        let of_set = snapshots.iter().rev().filter(|snapshot| snapshot.replica_set == Some(self.set));
        let newest = of_set.filter_map(|snapshot| snapshot.resume_point).find(|point| Some(*point) > after);
        if let Some(point) = newest {
            let mut scan = self.oplog.read(point, point);
            if matches!(scan.next().await?, OplogRead::Entries(_)) {
                return Ok(point);
            }
        }
        self.oplog.beginning().await
    }

    /// Opens a slice that begins with the entry at a position; false if that is not there, or is another entry.
    async fn open_at(&mut self, first: Timestamp, sum: Option<EntrySum>) -> Result<bool> {
        let mut scan = self.oplog.read(first, first);
        let OplogRead::Entries(batch) = scan.next().await? else { return Ok(false) };
        let Some(entry) = batch.documents()?.next().transpose()? else { return Ok(false) };
        if sum.is_some_and(|sum| sum != EntrySum::of(entry)) {
            return Ok(false);
        }
        self.slice = OpenSlice::default();
        self.slice.push(first, entry);
        self.unstored = None;
        self.report.until = first;
        Ok(true)
    }

    /// Reads what a majority holds by now, and stores slices that are large or old enough; all of it if `flush` says so.
    async fn catch_up(&mut self, flush: bool) -> Result<()> {
        if self.slice.bytes() >= self.capture.settings.slice_bytes {
            self.store().await?;
        }
        let newest = self.oplog.newest().await?;
        let Some((reached, _)) = self.slice.last() else { return Err(Error::internal("a capture without a beginning")) };
        if newest > reached {
            let mut scan = self.oplog.read(reached, newest);
            loop {
                match scan.next().await? {
                    OplogRead::Entries(batch) => {
                        for entry in batch.documents()? {
                            let entry = entry?;
                            let at = position_in(entry)?;
                            if at <= self.slice.last().map_or(reached, |(last, _)| last) {
                                continue;
                            }
                            // What is not known here may be known to whoever restores it.
                            let is_note = Entry::parse(entry).is_ok_and(|entry| entry.action.is_none());
                            let (since, is_change) = self.unstored.unwrap_or((Instant::now(), false));
                            self.unstored = Some((since, is_change || !is_note));
                            self.slice.push(at, entry);
                            if self.slice.bytes() >= self.capture.settings.slice_bytes {
                                self.store().await?;
                            }
                        }
                    }
                    OplogRead::End => break,
                    _ => {
                        self.store().await?;
                        let end = self.slice.last();
                        return self.start(end, "the oplog was overrun before it was captured").await;
                    }
                }
            }
        }
        let settings = &self.capture.settings;
        let is_due = self.unstored.is_some_and(|(since, is_change)| {
            since.elapsed() >= if is_change { settings.every } else { settings.every.max(IDLE) }
        });
        if is_due || flush { self.store().await } else { Ok(()) }
    }

    /// Stores the slice, and begins the next.
    async fn store(&mut self) -> Result<()> {
        if self.unstored.is_none() {
            return Ok(());
        }
        self.report.stored_bytes += self.capture.repository.store_slice(self.set, &self.slice, LEVEL).await?;
        self.report.slices += 1;
        self.report.entries += u64::try_from(self.slice.entries() - 1).unwrap_or(0);
        if let Some((last, _)) = self.slice.last() {
            self.report.until = last;
        }
        self.slice = self.slice.next()?;
        self.unstored = None;
        Ok(())
    }
}

/// A position as people write it: seconds and the number in the second.
pub(crate) fn position(at: Timestamp) -> String {
    format!("{}:{}", at.time, at.increment)
}

const LEVEL: i32 = 1;
/// What is nothing but notes is stored so rarely.
const IDLE: Duration = Duration::from_secs(60);
const LAST_READING: Duration = Duration::from_secs(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
