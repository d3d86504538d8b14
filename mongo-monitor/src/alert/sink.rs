//! Who is told of alerts.

use std::{fmt, sync::Mutex};

use mongo_core::lock::lock;

use super::engine::{Alert, AlertPhase};
use crate::failover::{FailoverEvent, FailoverKind, FailoverSink};

/// Is told of alerts: of all that began, went on for long enough to be told again, or were resolved in a round, together.
///
/// Called where the alerts are evaluated: one that sends over a network hands them on to a task of its own, as the webhook does.
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

impl FailoverSink for LogSink {
    /// What is bad news as a warning, what is good news as information.
    fn tell_failover(&self, event: &FailoverEvent) {
        let (kind, summary) = (event.kind.name(), &event.summary);
        match event.kind {
            FailoverKind::ServerUp | FailoverKind::NewPrimary | FailoverKind::WritableServer => tracing::info!(kind, "{summary}"),
            _ => tracing::warn!(kind, "{summary}"),
        }
    }
}

/// Keeps what it is told, for tests.
#[derive(Debug, Default)]
pub struct CollectingSink {
    alerts: Mutex<Vec<Alert>>,
    failovers: Mutex<Vec<FailoverEvent>>,
}

impl CollectingSink {
    /// The alerts that were told since the last call.
    pub fn take(&self) -> Vec<Alert> {
        std::mem::take(&mut lock(&self.alerts))
    }

    /// The failovers that were told since the last call.
    pub fn take_failovers(&self) -> Vec<FailoverEvent> {
        std::mem::take(&mut lock(&self.failovers))
    }
}

impl FailoverSink for CollectingSink {
    fn tell_failover(&self, event: &FailoverEvent) {
        lock(&self.failovers).push(event.clone());
    }
}

impl AlertSink for CollectingSink {
    fn tell(&self, news: &[Alert]) {
        lock(&self.alerts).extend_from_slice(news);
    }
}
