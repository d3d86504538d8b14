//! What a long operation tells its host while it runs.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use crate::lock::lock;

/// Receives what happens during a long operation.
///
/// Called from the operation's own tasks: it must not block. Between two [`ProgressEvent::Advanced`] of a phase at
/// least 100 ms pass, whatever the speed of the work.
pub trait ProgressSink: fmt::Debug + Send + Sync + 'static {
    /// One event.
    fn event(&self, event: &ProgressEvent);
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgressEvent {
    /// A phase began.
    #[non_exhaustive]
    PhaseStarted {
        /// Its name, for example `"data"`.
        phase: &'static str,
        /// How much there is to do, where that is known.
        total: Total,
    },
    /// More of the phase is done. Numbers count from the start of the phase.
    #[non_exhaustive]
    Advanced {
        /// The phase.
        phase: &'static str,
        /// Documents done.
        documents: u64,
        /// Bytes of plain BSON done.
        bytes: u64,
    },
    /// A phase ended, with its final numbers.
    #[non_exhaustive]
    PhaseFinished {
        /// The phase.
        phase: &'static str,
        /// Documents done.
        documents: u64,
        /// Bytes of plain BSON done.
        bytes: u64,
    },
    /// Something worth telling that is no failure: a retry, a degraded guarantee.
    Note(String),
}

/// How much a phase has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Total {
    /// Nothing is known in advance.
    #[default]
    Unknown,
    /// From collection statistics, which an unclean shutdown can falsify.
    #[non_exhaustive]
    Estimate {
        /// Documents.
        documents: u64,
        /// Bytes of plain BSON.
        bytes: u64,
    },
    /// Counted.
    #[non_exhaustive]
    Exact {
        /// Documents.
        documents: u64,
        /// Bytes of plain BSON.
        bytes: u64,
    },
}

impl Total {
    /// An estimate.
    pub fn estimate(documents: u64, bytes: u64) -> Self {
        Self::Estimate { documents, bytes }
    }

    /// An exact total.
    pub fn exact(documents: u64, bytes: u64) -> Self {
        Self::Exact { documents, bytes }
    }
}

/// Drops every event.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "it will never hold anything")]
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn event(&self, _event: &ProgressEvent) {}
}

/// Keeps every event in memory, for tests.
#[derive(Debug, Default)]
pub struct CollectedProgress(Mutex<Vec<ProgressEvent>>);

impl CollectedProgress {
    /// The events so far, in order.
    pub fn events(&self) -> Vec<ProgressEvent> {
        lock(&self.0).clone()
    }
}

impl ProgressSink for CollectedProgress {
    fn event(&self, event: &ProgressEvent) {
        lock(&self.0).push(event.clone());
    }
}

/// Counts one phase from any number of tasks and tells a sink no more often than it should be told.
#[derive(Debug)]
pub struct PhaseMeter {
    phase: &'static str,
    sink: Arc<dyn ProgressSink>,
    documents: AtomicU64,
    bytes: AtomicU64,
    last_told: Mutex<Instant>,
}

impl PhaseMeter {
    /// Starts a phase and tells the sink.
    pub fn start(sink: Arc<dyn ProgressSink>, phase: &'static str, total: Total) -> Self {
        sink.event(&ProgressEvent::PhaseStarted { phase, total });
        Self { phase, sink, documents: AtomicU64::new(0), bytes: AtomicU64::new(0), last_told: Mutex::new(Instant::now()) }
    }

    /// Adds what was done.
    pub fn advance(&self, documents: u64, bytes: u64) {
        let documents = self.documents.fetch_add(documents, Relaxed) + documents;
        let bytes = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        // Whoever does not get the lock at once need not tell: somebody else is just telling.
        if let Ok(mut last) = self.last_told.try_lock()
            && last.elapsed() >= INTERVAL
        {
            *last = Instant::now();
            self.sink.event(&ProgressEvent::Advanced { phase: self.phase, documents, bytes });
        }
    }

    /// Passes a note on.
    pub fn note(&self, text: impl Into<String>) {
        self.sink.event(&ProgressEvent::Note(text.into()));
    }

    /// Documents and bytes so far.
    pub fn done(&self) -> (u64, u64) {
        (self.documents.load(Relaxed), self.bytes.load(Relaxed))
    }

    /// Ends the phase and tells the sink.
    pub fn finish(self) {
        let (documents, bytes) = self.done();
        self.sink.event(&ProgressEvent::PhaseFinished { phase: self.phase, documents, bytes });
    }
}

const INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fast_phase_tells_at_most_ten_times_a_second() {
        let sink = Arc::new(CollectedProgress::default());
        let meter = PhaseMeter::start(Arc::<CollectedProgress>::clone(&sink), "data", Total::exact(1000, 0));
        for _ in 0..1000 {
            meter.advance(1, 10);
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        meter.finish();
        let events = sink.events();
        assert!((10..=12).contains(&events.len()), "{} events", events.len());
        assert_eq!(events.last(), Some(&ProgressEvent::PhaseFinished { phase: "data", documents: 1000, bytes: 10_000 }));
    }
}
