//! What a client of the host does, by the events of its driver: operations, pools, and who it takes the servers for.

mod commands;
mod distribution;
mod pools;
mod topology;

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    sync::{Arc, Mutex},
};

use mongo_core::{
    bson::DateTime,
    clock::{Clock, SystemClock},
    lock::lock,
    mongodb::{
        event::{EventHandler, cmap::CmapEvent, command::CommandEvent, sdam::SdamEvent},
        options::ClientOptions,
    },
};

use tokio::sync::watch;

use self::{commands::Commands, pools::Pools, topology::TopologyWatch};
use crate::{
    failover::{FailoverEvent, FailoverSink, Moment},
    reading::{self, Reading},
};

/// Watches a client from within: how long its operations take and what becomes of them, how its pools of connections fare, and how its deployment
/// [fails over](FailoverEvent).
///
/// It is told by the driver and asks nobody. Names are the stable ones of [OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/database/database-metrics/)
/// where it has any. Labels are commands, databases, collections and servers, never values; from the thousandth series of operations on
/// databases and collections are summed up as `_other`.
///
/// Watching operations makes the driver hand out a copy of each command and each answer, which costs some microseconds and, for large batches, more: a host
/// to which that matters has [`with_operations`](Self::with_operations) switched off.
///
/// How many wait for a connection is counted by the driver's events, which do not tell of those who gave up waiting because their future was dropped; it is
/// taken for none while a connection is idle.
///
/// ```no_run
/// # async fn f(monitor: mongo_monitor::Monitor) -> mongo_core::Result<()> {
/// use mongo_core::{ConnectOptions, mongodb::Client};
/// use mongo_monitor::ClientWatch;
///
/// let watch = ClientWatch::new();
/// let mut options = ConnectOptions::from_env()?.to_client_options().await?;
/// watch.attach(&mut options);
/// let client = Client::with_options(options)?;
/// // What it does is shown beside what the servers do.
/// monitor.include(watch.clone());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct ClientWatch {
    shared: Arc<Shared>,
    with_operations: bool,
}

struct Shared {
    clock: Arc<dyn Clock>,
    commands: Mutex<Commands>,
    pools: Mutex<Pools>,
    topology: Mutex<TopologyWatch>,
    events: Mutex<VecDeque<FailoverEvent>>,
    sinks: Mutex<Vec<Arc<dyn FailoverSink>>>,
    /// Counts the changes of the topology.
    changes: watch::Sender<u64>,
}

impl fmt::Debug for ClientWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientWatch").field("with_operations", &self.with_operations).finish_non_exhaustive()
    }
}

impl Default for ClientWatch {
    fn default() -> Self {
        Self::new()
    }
}

impl ClientWatch {
    /// One that watches nobody yet.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock::new()))
    }

    /// The same, by another clock.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let shared = Shared {
            clock,
            commands: Mutex::default(),
            pools: Mutex::default(),
            topology: Mutex::default(),
            events: Mutex::default(),
            sinks: Mutex::default(),
            changes: watch::Sender::new(0),
        };
        Self { shared: Arc::new(shared), with_operations: true }
    }

    /// Whether operations are watched. Default true.
    #[must_use]
    pub fn with_operations(mut self, are_watched: bool) -> Self {
        self.with_operations = are_watched;
        self
    }

    /// Has this one told of failovers, from now on.
    pub fn tell(&self, sink: Arc<dyn FailoverSink>) {
        lock(&self.shared.sinks).push(sink);
    }

    /// Has clients that are made with these options watched. Handlers of events that stand in them are told as before.
    ///
    /// A watch is for one client: what a second one does that is made with the same options is mixed in, but for how it sees its servers, which is left out.
    pub fn attach(&self, options: &mut ClientOptions) {
        if self.with_operations {
            let shared = Arc::clone(&self.shared);
            let watch = move |event: &CommandEvent| lock(&shared.commands).take(event);
            options.command_event_handler = Some(beside(options.command_event_handler.take(), watch));
        }
        let shared = Arc::clone(&self.shared);
        let watch = move |event: &CmapEvent| lock(&shared.pools).take(event, shared.clock.monotonic());
        options.cmap_event_handler = Some(beside(options.cmap_event_handler.take(), watch));
        let shared = Arc::clone(&self.shared);
        let watch = move |event: &SdamEvent| shared.take_topology(event);
        options.sdam_event_handler = Some(beside(options.sdam_event_handler.take(), watch));
    }

    /// The failovers that were noticed, the newest last; of many the newest 256.
    pub fn failovers(&self) -> Vec<FailoverEvent> {
        lock(&self.shared.events).iter().cloned().collect()
    }

    /// The members of the replica set that the client is connected to, but for hidden ones; none for what is no set.
    pub(crate) fn members_of_set(&self) -> Option<BTreeSet<String>> {
        lock(&self.shared.topology).members_of_set()
    }

    /// The servers that the client takes for such as take writes.
    pub(crate) fn writable(&self) -> BTreeSet<String> {
        lock(&self.shared.topology).writable()
    }

    /// Whether the client has found out what it is connected to, or that nobody is there.
    pub(crate) fn has_found_somebody(&self) -> bool {
        lock(&self.shared.topology).has_found_somebody()
    }

    /// Counts the changes of what the client takes the servers for.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// What has been counted up to now.
    pub fn readings(&self) -> Vec<Reading> {
        let mut readings = lock(&self.shared.commands).readings();
        readings.extend(lock(&self.shared.pools).readings());
        readings.extend(lock(&self.shared.topology).readings());
        reading::sort(&mut readings);
        readings
    }
}

impl Shared {
    fn take_topology(&self, event: &SdamEvent) {
        let now = Moment { at: self.clock.monotonic(), wall: DateTime::from_system_time(self.clock.wall()) };
        let news = lock(&self.topology).take(event, now);
        if matches!(event, SdamEvent::TopologyDescriptionChanged(_)) {
            self.changes.send_modify(|changes| *changes += 1);
        }
        if news.is_empty() {
            return;
        }
        let mut events = lock(&self.events);
        events.extend(news.iter().cloned());
        let too_many = events.len().saturating_sub(EVENTS);
        events.drain(..too_many);
        drop(events);
        // A sink may ask for the events, so they must not be held meanwhile.
        let sinks = lock(&self.sinks).clone();
        for sink in sinks {
            news.iter().for_each(|event| sink.tell_failover(event));
        }
    }
}

/// A handler that is told besides the one that was there.
fn beside<T: Clone + Send + Sync + 'static>(
    other: Option<EventHandler<T>>,
    watch: impl Fn(&T) + Send + Sync + 'static,
) -> EventHandler<T> {
    EventHandler::callback(move |event: T| {
        watch(&event);
        match &other {
            Some(EventHandler::Callback(other)) => other(event),
            Some(EventHandler::AsyncCallback(other)) => drop(tokio::spawn(other(event))),
            Some(EventHandler::TokioMpsc(other)) => {
                let other = other.clone();
                // Who no longer listens is not told.
                tokio::spawn(async move { other.send(event).await.ok() });
            }
            Some(_) => tracing::warn!("a client's handler of events is of a kind that is not known here, and is no longer told"),
            None => {}
        }
    })
}

const EVENTS: usize = 256;
