//! What is read of a member, and how often.

use std::{fmt, time::Duration};

use mongo_core::{
    ErrorKind, Result,
    bson::{Bson, Document, Timestamp, doc},
    mongodb::Client,
    replica_set::{ReplicaSetExt as _, ReplicaSetStatus},
};
use tokio::{sync::watch, time::Instant};

use crate::{
    current_operations::{self, SlowOperation},
    diagnostics::Diagnostics,
    lacking::Lacking,
    monitor::MonitorSettings,
    namespaces::Namespaces,
    reading::{Epoch, Reading},
    replica_set::{self, Delays, Oplog, OplogSize},
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
    Latencies,
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
    /// When it was so, where that is not just now.
    pub(crate) at: Option<Duration>,
    /// Whether the member has answered for it, instead of its having been there already.
    pub(crate) is_answer: bool,
    /// How long answers were waited for that did not come.
    pub(crate) waited: Duration,
}

impl Collected {
    pub(crate) fn of(readings: Vec<Reading>) -> Self {
        Self {
            epoch: None,
            readings,
            slow_operations: Vec::new(),
            lacking: None,
            at: None,
            is_answer: true,
            waited: Duration::ZERO,
        }
    }

    /// What was read of many things, and what of them was not.
    pub(crate) fn but(lacking: &Lacking, readings: Vec<Reading>) -> Self {
        let is_answer = lacking.has_answered();
        Self { lacking: lacking.told(), is_answer, waited: lacking.waited(), ..Self::of(readings) }
    }
}

impl Collector {
    pub(crate) const ALL: [Self; 7] = [
        Self::Up,
        Self::ServerStatus,
        Self::ReplicaSet,
        Self::CurrentOperations,
        Self::Latencies,
        Self::Namespaces,
        Self::Sharding,
    ];

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
            // A distribution changes slowly.
            Self::Latencies => settings.interval.max(settings.namespace_interval / 2),
            // What costs more the more there is to tell is told more seldom: it never takes more than a hundredth of the time.
            Self::Namespaces | Self::Sharding => settings.namespace_interval.max(took * 100).min(LONGEST_INTERVAL),
            _ => settings.interval,
        }
    }

    /// From which age on what it has read is no longer shown as if it were so now.
    pub(crate) fn stale_after(self, settings: &MonitorSettings, took: Duration) -> Duration {
        self.interval(settings, took) * 3 + self.deadline(settings)
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
            Self::Latencies => "latencies",
            Self::Namespaces => "namespaces",
            Self::Sharding => "sharding",
        })
    }
}

/// The member that is asked, and how.
pub(crate) struct Asked<'a> {
    pub(crate) client: &'a Client,
    pub(crate) diagnostics: &'a Diagnostics,
    /// When it answered a collector last.
    pub(crate) answered: watch::Receiver<Option<Instant>>,
    pub(crate) settings: &'a MonitorSettings,
    /// How our own connections name themselves.
    pub(crate) own_name: &'a str,
    /// The time by the clock that samples are dated with.
    pub(crate) now: &'a (dyn Fn() -> Duration + Send + Sync),
}

/// A collector at work on one member, with what it must remember from one time to the next.
pub(crate) struct Reader {
    collector: Collector,
    namespaces: Namespaces,
    run: Option<Run>,
    host: Vec<Reading>,
    oplog_size: Option<(Instant, OplogSize)>,
    /// Of the configuration of this version.
    delays: Option<(Option<i64>, Delays)>,
}

/// A run of a server's process.
#[derive(Clone, Copy)]
struct Run {
    pid: i64,
    /// When it began, in milliseconds of our own clock, which may lie before its beginning. What is read says for how long the process has been running, and took some
    /// time to arrive: the smallest difference that was ever seen is nearest to the truth.
    began: i64,
    /// When it was read of last, how long it had been running then, and when that was.
    seen: i64,
    uptime: i64,
    at: i64,
}

impl Reader {
    pub(crate) fn new(collector: Collector) -> Self {
        Self { collector, namespaces: Namespaces::default(), run: None, host: Vec::new(), oplog_size: None, delays: None }
    }

    /// Reads through a client that is connected to the member alone.
    ///
    /// # Cancel safety
    /// What it remembers stays in order if the future is dropped.
    pub(crate) async fn read(&mut self, asked: Asked<'_>) -> Result<Collected> {
        let Asked { client, settings, .. } = asked;
        match self.collector {
            Collector::Up => up(asked).await,
            Collector::ServerStatus => self.read_server_status(&asked).await,
            Collector::ReplicaSet => self.read_replica_set(&asked).await,
            Collector::CurrentOperations => {
                let read = current_operations::read(client, settings.slow_operation, settings.show_values, asked.own_name).await;
                or_nothing_without_data(read, client).await
            }
            Collector::Latencies => {
                let status = client.database("admin").run_command(server_status::latencies_command()).await?;
                Ok(Collected::of(server_status::latencies(&status)))
            }
            Collector::Namespaces => {
                let read = self.namespaces.read(client, settings).await;
                or_nothing_without_data(read, client).await
            }
            Collector::Sharding => sharding::read(client, settings.deadline).await,
        }
    }

    async fn read_server_status(&mut self, asked: &Asked<'_>) -> Result<Collected> {
        let begun = (asked.now)();
        let admin = asked.client.database("admin");
        let diagnostics = asked.diagnostics.read(asked.client, asked.settings.interval, asked.settings.deadline).await;
        let mut lacking = None;
        let mut is_answer = true;
        let (epoch, mut readings) = match diagnostics.as_ref().map(|(data, _)| (data, data.get_document("serverStatus"))) {
            Some((data, Ok(status))) => {
                let (epoch, mut readings) = server_status::read(status);
                readings.extend(server_status::of_machine(data));
                is_answer = diagnostics.as_ref().is_some_and(|(_, has_asked)| *has_asked);
                (epoch, readings)
            }
            _ => server_status::read(&admin.run_raw_command(server_status::command()).await?),
        };
        let now = (asked.now)();
        let (is_new_run, at) = match epoch {
            Some(epoch) => self.place(epoch, begun, now, diagnostics.is_some()),
            None => (false, now),
        };
        if is_new_run || self.host.is_empty() {
            match admin.run_command(doc! { "hostInfo": 1 }).await.map_err(mongo_core::Error::from) {
                Ok(info) => self.host = server_status::of_host(&info),
                Err(error) => lacking = Some(format!("the machine is not known: {}", error.report())),
            }
        }
        readings.extend(self.host.iter().cloned());
        Ok(Collected { epoch, lacking, at: Some(at.min(now)), is_answer, ..Collected::of(readings) })
    }

    /// When what was read was so, by our own clock, and whether it is of another run than what was read before. It was asked for and read at these times, and `is_older` says whether
    /// it had been lying ready.
    fn place(&mut self, epoch: Epoch, begun: Duration, now: Duration, is_older: bool) -> (bool, Duration) {
        let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let (uptime, begun, now) = (millis(epoch.uptime), millis(begun), millis(now));
        let lain = if is_older { millis(LAIN) } else { 0 };
        let goes_on = |run: &Run| run.pid == epoch.pid && begun - lain - TOLERANCE - uptime <= run.began;
        let (is_new, began) = match self.run.filter(goes_on) {
            // Two clocks do not go alike: what was nearest to the truth is so no longer after a while.
            Some(run) => (false, (run.began + (now - run.seen) / DRIFT).min(now - uptime)),
            None => (true, now - uptime),
        };
        // What is read twice was so once.
        let same = self.run.filter(|run| !is_new && run.uptime == uptime).map(|run| run.at);
        let at = same.unwrap_or(began + uptime);
        self.run = Some(Run { pid: epoch.pid, began, seen: now, uptime, at });
        (is_new, Duration::from_millis(u64::try_from(at).unwrap_or(0)))
    }

    async fn read_replica_set(&mut self, asked: &Asked<'_>) -> Result<Collected> {
        let diagnostics = asked.diagnostics.read(asked.client, asked.settings.interval, asked.settings.deadline).await;
        let (status, known, is_answer) = match diagnostics {
            Some((data, is_answer)) => {
                let status =
                    data.get_document("replSetGetStatus").ok().and_then(|status| ReplicaSetStatus::from_reply(status).ok());
                // A server by itself has none, nor one whose set has not been initiated.
                let Some(status) = status else { return Ok(Collected { is_answer, ..Collected::of(Vec::new()) }) };
                (status, Oplog::of_diagnostics(&data), is_answer)
            }
            None => match asked.client.replica_set_status().await {
                Ok(status) => (status, Oplog::default(), true),
                // The same, in words.
                Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound) => {
                    return Ok(Collected::of(Vec::new()));
                }
                // A router has none either, and says so in words alone.
                Err(_) if is_router(asked.client).await => return Ok(Collected::of(Vec::new())),
                Err(error) => return Err(error),
            },
        };
        // Arbiters have no oplog, and it may not be for everybody to read.
        let (oplog, lacking) = match holds_data(&status) && !known.is_whole() {
            false => (known, None),
            // Before 6.0 a server does not collect its ends.
            true => match self.oplog(asked.client).await {
                Ok(oplog) => (oplog, None),
                Err(error) => (Oplog::default(), Some(format!("the oplog cannot be read: {}", error.report()))),
            },
        };
        let delays = self.delays(asked.client, &status).await;
        Ok(Collected { lacking, is_answer, ..Collected::of(replica_set::read(&status, &oplog, &delays)) })
    }

    /// By how much members are to be behind, by a configuration that is read when there is a new one. Where it may not be read, nobody is to.
    async fn delays(&mut self, client: &Client, status: &ReplicaSetStatus) -> Delays {
        let version = status.members.iter().find(|member| member.is_asked).map(|asked| asked.config_version);
        if self.delays.as_ref().is_none_or(|(known, _)| *known != version) {
            let delays = match client.replica_set_config().await {
                Ok(config) => config.members.iter().map(|member| (member.host.clone(), member.delay)).collect(),
                Err(error) => {
                    tracing::debug!(error = %error.report(), "the configuration of a set cannot be read");
                    Delays::new()
                }
            };
            self.delays = Some((version, delays));
        }
        self.delays.as_ref().map(|(_, delays)| delays.clone()).unwrap_or_default()
    }

    /// A member's oplog: its ends, and how large it is. The latter costs the server more than all else, and changes slowly.
    async fn oplog(&mut self, client: &Client) -> Result<Oplog> {
        let oplog = client.database("local").collection::<Document>("oplog.rs");
        let end = async |direction: i32| {
            let entry = oplog.find_one(doc! {}).sort(doc! { "$natural": direction }).projection(doc! { "ts": 1 }).await?;
            Ok::<_, mongo_core::Error>(entry.and_then(|entry| entry.get_timestamp("ts").ok()))
        };
        let (oldest, newest): (Option<Timestamp>, Option<Timestamp>) = (end(1).await?, end(-1).await?);
        let size = match self.oplog_size.filter(|(at, _)| at.elapsed() < OPLOG_SIZE_FOR) {
            Some((_, size)) => size,
            None => {
                let stages = [
                    doc! { "$collStats": { "storageStats": {} } },
                    doc! { "$project": { "size": "$storageStats.size", "maxSize": "$storageStats.maxSize" } },
                ];
                let mut cursor = oplog.aggregate(stages).await?;
                let stats = if cursor.advance().await? { cursor.deserialize_current()? } else { Document::new() };
                let size = OplogSize::of(&stats);
                self.oplog_size = Some((Instant::now(), size));
                size
            }
        };
        Ok(Oplog { window: replica_set::window(oldest, newest), size })
    }
}

fn holds_data(status: &ReplicaSetStatus) -> bool {
    status.members.iter().find(|member| member.is_asked).is_some_and(|asked| asked.applied.is_some())
}

async fn is_router(client: &Client) -> bool {
    let hello = client.database("admin").run_command(doc! { "hello": 1 }).await;
    hello.is_ok_and(|hello| hello.get_str("msg").ok() == Some("isdbgrid"))
}

/// Those who hold no data, as arbiters, refuse what is about data, and that is in order.
async fn or_nothing_without_data(read: Result<Collected>, client: &Client) -> Result<Collected> {
    let Err(error) = read else { return read };
    let hello = client.database("admin").run_command(doc! { "hello": 1 }).await;
    let is_arbiter = hello.is_ok_and(|hello| hello.get_bool("arbiterOnly").unwrap_or(false));
    if is_arbiter { Ok(Collected::of(Vec::new())) } else { Err(error) }
}

/// Who answers another collector need not be asked whether he is there.
async fn up(mut asked: Asked<'_>) -> Result<Collected> {
    let begun = Instant::now();
    let answers = asked.answered.wait_for(|answered| answered.is_some_and(|at| at >= begun));
    if !matches!(tokio::time::timeout(ANSWERS_WITHIN, answers).await, Ok(Ok(_))) {
        asked.client.database("admin").run_command(doc! { "ping": 1 }).await?;
    }
    let up = metric("mongodb_up").map(|up| Reading::number(up, Vec::new(), 1.0));
    Ok(Collected::of(up.into_iter().collect()))
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

/// However long it takes.
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
const PING_WITHIN: Duration = Duration::from_secs(2);
/// How long other collectors are waited for before a member is asked whether it is there.
const ANSWERS_WITHIN: Duration = Duration::from_millis(250);
const OPLOG_SIZE_FOR: Duration = Duration::from_secs(60);
/// How long what a server has collected may have been lying there.
const LAIN: Duration = Duration::from_secs(4);
/// A clock may be slower or faster than another by one part in so many.
const DRIFT: i64 = 1000;
/// Milliseconds by which the clocks of two machines may drift apart while a process runs, between two readings.
const TOLERANCE: i64 = 100;

#[cfg(test)]
mod tests {
    use mongo_core::bson::DateTime;

    use super::*;

    fn place(reader: &mut Reader, pid: i64, uptime: u64, begun: u64, now: u64, is_older: bool) -> (bool, u64) {
        let epoch = Epoch { pid, started: DateTime::from_millis(0), uptime: Duration::from_millis(uptime) };
        let (is_new, at) = reader.place(epoch, Duration::from_millis(begun), Duration::from_millis(now), is_older);
        (is_new, u64::try_from(at.as_millis()).unwrap())
    }

    #[test]
    fn what_was_read_is_dated_by_when_it_was_so_and_not_by_when_it_arrived() {
        let mut reader = Reader::new(Collector::ServerStatus);
        // Up for longer than we are; collected half a second before.
        assert_eq!(place(&mut reader, 1, 900_000, 10_000, 10_010, true), (true, 10_010));
        assert_eq!(place(&mut reader, 1, 910_400, 20_000, 20_010, true), (false, 20_010), "nearer to the truth");
        assert_eq!(place(&mut reader, 1, 919_500, 30_000, 30_010, true), (false, 29_120));
        assert_eq!(place(&mut reader, 1, 919_500, 30_200, 30_210, true), (false, 29_120), "the same once more");
        // An answer that takes for ever is of the same run all the same.
        assert_eq!(place(&mut reader, 1, 930_450, 30_500, 40_500, false), (false, 40_080));
    }

    #[test]
    fn a_process_that_began_anew_is_another_run_whatever_its_number() {
        for pid in [1, 2] {
            let mut reader = Reader::new(Collector::ServerStatus);
            place(&mut reader, 1, 50_000, 60_000, 60_001, false);
            assert_eq!(place(&mut reader, pid, 5_000, 70_000, 70_001, false), (true, 70_001));
            assert!(!place(&mut reader, pid, 15_000, 80_000, 80_001, false).0);
        }
    }
}
