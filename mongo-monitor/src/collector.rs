//! What is read of a member, and how often.

use std::{fmt, time::Duration};

use mongo_core::{
    ErrorKind, Result,
    bson::{Bson, Document, Timestamp, doc},
    mongodb::Client,
    replica_set::ReplicaSetExt as _,
};

use crate::{
    current_operations::{self, SlowOperation},
    monitor::MonitorSettings,
    namespaces::Namespaces,
    reading::{Epoch, Reading},
    replica_set::{self, Oplog},
    server_status, sharding,
    table::metric,
};

/// What reads one kind of thing of a member. Each has its own interval and deadline, so that none holds up another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Collector {
    Up,
    ServerStatus,
    ReplicaSet,
    CurrentOperations,
    Namespaces,
    Sharding,
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
    pub(crate) const ALL: [Self; 6] =
        [Self::Up, Self::ServerStatus, Self::ReplicaSet, Self::CurrentOperations, Self::Namespaces, Self::Sharding];

    pub(crate) fn deadline(self, settings: &MonitorSettings) -> Duration {
        match self {
            // Whether somebody is there must be known soon.
            Self::Up => settings.deadline.min(PING_WITHIN),
            // Many commands, each of which has the deadline.
            Self::Namespaces | Self::Sharding => settings.deadline * 12,
            _ => settings.deadline,
        }
    }

    /// After how long it reads again, if the last time took so long.
    pub(crate) fn interval(self, settings: &MonitorSettings, took: Duration) -> Duration {
        match self {
            // What costs more the more there is to tell is told more seldom: it never takes more than a hundredth of the time.
            Self::Namespaces | Self::Sharding => settings.namespace_interval.max(took * 100),
            _ => settings.interval,
        }
    }

    /// What is said of a member that does not answer.
    pub(crate) fn without_answer(self) -> Vec<Reading> {
        match self {
            Self::Up => metric("mongodb_up").map(|up| Reading::number(up, Vec::new(), 0.0)).into_iter().collect(),
            _ => Vec::new(),
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
            Self::Namespaces => "namespaces",
            Self::Sharding => "sharding",
        })
    }
}

/// A collector at work on one member, with what it must remember from one time to the next.
pub(crate) struct Reader {
    collector: Collector,
    namespaces: Namespaces,
    host: Host,
}

/// The machine that a server runs on, which does not change while it runs.
#[derive(Default)]
struct Host {
    readings: Vec<Reading>,
    /// Of the run of the server that told it.
    of: Option<Epoch>,
}

impl Reader {
    pub(crate) fn new(collector: Collector) -> Self {
        Self { collector, namespaces: Namespaces::default(), host: Host::default() }
    }

    /// Reads through a client that is connected to the member alone.
    ///
    /// # Cancel safety
    /// What it remembers stays in order if the future is dropped.
    pub(crate) async fn read(&mut self, client: &Client, settings: &MonitorSettings, own_name: &str) -> Result<Collected> {
        match self.collector {
            Collector::Up => up(client).await,
            Collector::ServerStatus => self.read_server_status(client).await,
            Collector::ReplicaSet => read_replica_set(client).await,
            Collector::CurrentOperations => {
                let read = current_operations::read(client, settings.slow_operation, settings.show_values, own_name).await;
                or_nothing_without_data(read, client).await
            }
            Collector::Namespaces => {
                let read = self.namespaces.read(client, settings).await;
                or_nothing_without_data(read, client).await
            }
            Collector::Sharding => sharding::read(client).await,
        }
    }
}

impl Reader {
    async fn read_server_status(&mut self, client: &Client) -> Result<Collected> {
        let admin = client.database("admin");
        let status = admin.run_raw_command(server_status::command()).await?;
        let (epoch, mut readings) = server_status::read(&status);
        let mut lacking = None;
        let is_known = self.host.of.zip(epoch).is_some_and(|(of, now)| of.pid == now.pid && now.uptime >= of.uptime);
        if !is_known {
            match admin.run_command(doc! { "hostInfo": 1 }).await.map_err(mongo_core::Error::from) {
                Ok(info) => self.host = Host { readings: server_status::of_host(&info), of: epoch },
                Err(error) => lacking = Some(format!("the machine is not known: {}", error.report())),
            }
        }
        readings.extend(self.host.readings.iter().cloned());
        Ok(Collected { epoch, lacking, ..Collected::of(readings) })
    }
}

/// Those who hold no data, as arbiters, refuse what is about data, and that is in order.
async fn or_nothing_without_data(read: Result<Collected>, client: &Client) -> Result<Collected> {
    let Err(error) = read else { return read };
    let hello = client.database("admin").run_command(doc! { "hello": 1 }).await;
    let is_arbiter = hello.is_ok_and(|hello| hello.get_bool("arbiterOnly").unwrap_or(false));
    if is_arbiter { Ok(Collected::of(Vec::new())) } else { Err(error) }
}

async fn up(client: &Client) -> Result<Collected> {
    client.database("admin").run_command(doc! { "ping": 1 }).await?;
    let up = metric("mongodb_up").map(|up| Reading::number(up, Vec::new(), 1.0));
    Ok(Collected::of(up.into_iter().collect()))
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
    let (oplog, lacking) = match holds_data {
        false => (Oplog::default(), None),
        true => match oplog(client).await {
            Ok(oplog) => (oplog, None),
            Err(error) => (Oplog::default(), Some(format!("the oplog cannot be read: {}", error.report()))),
        },
    };
    Ok(Collected { lacking, ..Collected::of(replica_set::read(&status, &oplog)) })
}

/// A member's oplog: its ends, and how large it is.
async fn oplog(client: &Client) -> Result<Oplog> {
    let oplog = client.database("local").collection::<Document>("oplog.rs");
    let end = async |direction: i32| {
        let entry = oplog.find_one(doc! {}).sort(doc! { "$natural": direction }).projection(doc! { "ts": 1 }).await?;
        Ok::<_, mongo_core::Error>(entry.and_then(|entry| entry.get_timestamp("ts").ok()))
    };
    let (oldest, newest): (Option<Timestamp>, Option<Timestamp>) = (end(1).await?, end(-1).await?);
    let seconds = newest.zip(oldest).map(|(newest, oldest)| newest.time.saturating_sub(oldest.time));
    let size = [
        doc! { "$collStats": { "storageStats": {} } },
        doc! { "$project": { "size": "$storageStats.size", "max": "$storageStats.maxSize" } },
    ];
    let mut cursor = oplog.aggregate(size).await?;
    let stats = if cursor.advance().await? { cursor.deserialize_current()? } else { Document::new() };
    let bytes = |name: &str| stats.get(name).and_then(number);
    Ok(Oplog {
        window: seconds.map(|seconds| Duration::from_secs(u64::from(seconds))),
        used_bytes: bytes("size"),
        max_bytes: bytes("max"),
    })
}

/// A number of whichever type; none that is not finite.
#[expect(clippy::cast_precision_loss, reason = "counters whose last digits do not matter")]
pub(crate) fn number(value: &Bson) -> Option<f64> {
    match value {
        Bson::Int32(number) => Some(f64::from(*number)),
        Bson::Int64(number) => Some(*number as f64),
        Bson::Double(number) => Some(*number).filter(|number| number.is_finite()),
        Bson::Boolean(is) => Some(f64::from(u8::from(*is))),
        _ => None,
    }
}

const PING_WITHIN: Duration = Duration::from_secs(2);
