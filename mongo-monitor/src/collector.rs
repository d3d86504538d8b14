//! What is read of a member, and how often.

use std::{fmt, time::Duration};

use mongo_core::{
    ErrorKind, Result,
    bson::{Document, Timestamp, doc},
    mongodb::Client,
    replica_set::ReplicaSetExt as _,
};

use crate::{
    current_operations::{self, SlowOperation},
    monitor::MonitorSettings,
    reading::{Epoch, Reading},
    replica_set, server_status,
    table::metric,
};

/// What reads one kind of thing of a member. Each has its own interval and deadline, so that none holds up another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Collector {
    Up,
    ServerStatus,
    ReplicaSet,
    CurrentOperations,
}

/// What a collector has read.
pub(crate) struct Collected {
    pub(crate) epoch: Option<Epoch>,
    pub(crate) readings: Vec<Reading>,
    pub(crate) slow_operations: Vec<SlowOperation>,
    /// Why there is not all that there could be.
    pub(crate) lacking: Option<String>,
}

impl Collected {
    pub(crate) fn of(readings: Vec<Reading>) -> Self {
        Self { epoch: None, readings, slow_operations: Vec::new(), lacking: None }
    }
}

impl Collector {
    pub(crate) const ALL: [Self; 4] = [Self::Up, Self::ServerStatus, Self::ReplicaSet, Self::CurrentOperations];

    pub(crate) fn deadline(self, settings: &MonitorSettings) -> Duration {
        match self {
            // Whether somebody is there must be known soon.
            Self::Up => settings.deadline.min(PING_WITHIN),
            _ => settings.deadline,
        }
    }

    /// What is said of a member that does not answer.
    pub(crate) fn without_answer(self) -> Vec<Reading> {
        match self {
            Self::Up => metric("mongodb_up").map(|up| Reading::number(up, Vec::new(), 0.0)).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Reads through a client that is connected to the member alone.
    pub(crate) async fn collect(self, client: &Client, settings: &MonitorSettings, own_name: &str) -> Result<Collected> {
        match self {
            Self::Up => up(client).await,
            Self::ServerStatus => read_server_status(client).await,
            Self::ReplicaSet => read_replica_set(client).await,
            Self::CurrentOperations => {
                current_operations::read(client, settings.slow_operation, settings.show_values, own_name).await
            }
        }
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::ServerStatus => "server_status",
            Self::ReplicaSet => "replica_set",
            Self::CurrentOperations => "current_operations",
        })
    }
}

async fn up(client: &Client) -> Result<Collected> {
    client.database("admin").run_command(doc! { "ping": 1 }).await?;
    let up = metric("mongodb_up").map(|up| Reading::number(up, Vec::new(), 1.0));
    Ok(Collected::of(up.into_iter().collect()))
}

async fn read_server_status(client: &Client) -> Result<Collected> {
    let status = client.database("admin").run_raw_command(server_status::command()).await?;
    let (epoch, readings) = server_status::read(&status);
    Ok(Collected { epoch, ..Collected::of(readings) })
}

async fn read_replica_set(client: &Client) -> Result<Collected> {
    let status = match client.replica_set_status().await {
        Ok(status) => status,
        // A standalone server has none, and that is in order.
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => {
            return Ok(Collected::of(Vec::new()));
        }
        Err(error) => return Err(error),
    };
    // Arbiters have no oplog, and it may not be for everybody to read.
    let holds_data = status.members.iter().find(|member| member.is_asked).is_some_and(|asked| asked.applied.is_some());
    let (window, lacking) = match holds_data {
        false => (None, None),
        true => match oplog_window(client).await {
            Ok(window) => (window, None),
            Err(error) => (None, Some(format!("the oplog cannot be read: {}", error.report()))),
        },
    };
    Ok(Collected { lacking, ..Collected::of(replica_set::read(&status, window)) })
}

/// From the oldest entry of a member's oplog to its newest.
async fn oplog_window(client: &Client) -> Result<Option<Duration>> {
    let oplog = client.database("local").collection::<Document>("oplog.rs");
    let end = async |direction: i32| {
        let entry = oplog.find_one(doc! {}).sort(doc! { "$natural": direction }).projection(doc! { "ts": 1 }).await?;
        Ok::<_, mongo_core::Error>(entry.and_then(|entry| entry.get_timestamp("ts").ok()))
    };
    let (oldest, newest): (Option<Timestamp>, Option<Timestamp>) = (end(1).await?, end(-1).await?);
    let seconds = newest.zip(oldest).map(|(newest, oldest)| newest.time.saturating_sub(oldest.time));
    Ok(seconds.map(|seconds| Duration::from_secs(u64::from(seconds))))
}

const PING_WITHIN: Duration = Duration::from_secs(2);
