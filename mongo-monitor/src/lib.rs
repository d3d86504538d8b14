#![doc = include_str!("../README.md")]

mod alert;
#[cfg(feature = "http")]
mod charts;
mod client_watch;
mod cluster;
mod collector;
mod current_operations;
mod diagnostics;
mod export;
mod failover;
mod history;
#[cfg(feature = "http")]
mod http;
mod lacking;
mod member;
mod metric;
mod monitor;
mod namespaces;
mod open_metrics;
mod reading;
mod replica_set;
mod server_status;
mod sharding;
mod table;

pub use alert::{
    Alert, AlertPhase, AlertSink, AlertState, Alerts, CollectingSink, Expression, LogSink, Quantity, Rule, Severity, Silence,
    Threshold, default_rules,
};
#[cfg(feature = "webhook")]
pub use alert::{WebhookSettings, WebhookSink};
pub use client_watch::ClientWatch;
pub use cluster::{ClusterView, ShardView};
pub use current_operations::SlowOperation;
pub use failover::{FailoverEvent, FailoverKind, FailoverSink};
pub use history::Summary;
#[cfg(feature = "http")]
pub use http::router;
pub use metric::{Kind, Metric, Unit};
pub use monitor::{CollectorView, MemberView, Monitor, MonitorSettings, View};
pub use open_metrics::OPEN_METRICS_CONTENT_TYPE;
pub use reading::{HistogramValue, Reading, Value};
pub use table::METRICS;
