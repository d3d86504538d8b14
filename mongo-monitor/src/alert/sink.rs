//! Who is told of alerts.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use super::engine::{Alert, AlertPhase};

/// Is told of alerts: of all that began, went on for long enough to be told again, or were resolved in a round, together.
///
/// Called where the alerts are evaluated: one that sends over a network hands them on, and none may ask the monitor for its alerts meanwhile.
pub trait AlertSink: fmt::Debug + Send + Sync + 'static {
    /// Takes the news of a round; never none.
    fn tell(&self, news: &[Alert]);
}

/// Writes alerts to the log: warnings as such, critical ones as errors, what is resolved as information.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::exhaustive_structs, reason = "it will never hold anything")]
pub struct LogSink;

impl AlertSink for LogSink {
    fn tell(&self, news: &[Alert]) {
        for alert in news {
            let (id, summary) = (&alert.id, &alert.summary);
            match (alert.phase, alert.severity) {
                (AlertPhase::Resolved, _) => tracing::info!(alert = id, "resolved: {summary}"),
                (_, super::Severity::Critical) => tracing::error!(alert = id, value = alert.value, "{summary}"),
                (_, super::Severity::Warning) => tracing::warn!(alert = id, value = alert.value, "{summary}"),
            }
        }
    }
}

/// Keeps what it is told, for tests.
#[derive(Debug, Default)]
pub struct CollectingSink(Mutex<Vec<Alert>>);

impl CollectingSink {
    /// Everything that was told since the last call.
    pub fn take(&self) -> Vec<Alert> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AlertSink for CollectingSink {
    fn tell(&self, news: &[Alert]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(news);
    }
}
