#![doc = include_str!("../README.md")]

pub mod breaker;
pub mod clock;
mod connect;
pub mod data;
mod error;
pub mod filter;
pub mod gate;
mod health;
#[doc(hidden)]
pub mod lock;
pub mod metrics;
mod namespace;
mod pattern;
pub mod progress;
pub mod rate;
mod redact;
pub mod replica_set;
mod replication_mode;
mod retry;
#[cfg(feature = "serde")]
#[doc(hidden)]
pub mod seconds;
pub mod state;
#[cfg(feature = "http-client")]
#[doc(hidden)]
pub mod tls;
pub mod transfer;
pub mod transform;

pub use mongodb;
pub use mongodb::bson;

pub use breaker::CircuitBreaker;
pub use connect::{ConnectOptions, Deployment, ServerVersion, Topology, connect, validate_uri};
pub use error::{BoxError, Error, ErrorKind, Result, classify_code};
pub use health::{Health, HealthStatus};
pub use namespace::{Namespace, NamespacePattern, NamespaceRenames, NamespaceSelection};
pub use pattern::TextPattern;
pub use redact::{Secret, redact_uris};
pub use replication_mode::ReplicationMode;
pub use retry::{RetryBudget, RetryPolicy, retry};
pub use tokio_util::sync::CancellationToken;
