//! One binary for all integration tests: servers that tests can share are started once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::field_reassign_with_default,
    clippy::future_not_send,
    clippy::disallowed_methods,
    reason = "a test says by panicking that something is wrong, and its numbers are its own"
)]

mod alert_webhook;
mod audit;
mod awkward;
mod backup;
mod bad_input;
mod capture;
mod client_watch;
mod connecting;
mod consistency;
mod core_data;
mod core_replica_set;
mod damage;
#[cfg(feature = "browser")]
mod dashboard;
mod diff;
mod encryption;
mod failover;
mod faults;
mod fidelity;

mod golden;
mod incremental;
mod interchange;
mod kill;
mod managed;
mod monitor;
mod monitor_members;
mod namespaces;
mod object_store;
mod open_metrics;
mod point_in_time;
mod proxy;
mod proxy_admin;
#[cfg(feature = "drivers")]
mod proxy_drivers;
mod proxy_faults;
mod proxy_rules;
mod proxy_topology;
mod prune;
mod replay;
mod restore_modes;
mod resume;
mod rewriting;
mod routing;
mod sharded;
mod support;
mod transfer;
mod workload;
