//! Alerts: rules over readings, what state each is in, and who is told.
//!
//! A rule's condition is looked at in every round. While it holds an alert is *pending*; when it has held for long enough the alert *fires*, and is told;
//! when it has not held for long enough, judged by a threshold of its own if the rule has one, the alert is *resolved*, which is told once.
//! That nothing can be read is neither: what fires goes on firing, and what is pending waits.

mod engine;
mod rule;
mod rules;
mod sink;
#[cfg(feature = "webhook")]
mod webhook;

pub use engine::{Alert, AlertPhase, AlertState, Alerts, Silence};
pub use rule::{Expression, Quantity, Rule, Severity, Threshold};
pub use rules::default_rules;
pub use sink::{AlertSink, CollectingSink, LogSink};
#[cfg(feature = "webhook")]
pub use webhook::{WebhookSettings, WebhookSink};
