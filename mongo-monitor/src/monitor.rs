//! The monitor: it samples every member in the background and shows what was read last, with its age.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, RwLock},
    time::Duration,
};

use mongo_core::{
    CancellationToken, ConnectOptions, Error, ErrorKind, Result,
    bson::DateTime,
    clock::{Clock, SystemClock},
    lock::{self, lock},
    metrics::MetricsSink,
    mongodb::{
        Client,
        options::{ClientOptions, ServerAddress},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    alert::{Alert, Alerts},
    client_watch::ClientWatch,
    collector::{Collector, Reader},
    current_operations::SlowOperation,
    export::Export,
    failover::{FailoverEvent, FailoverSink},
    history::{Point, Summary},
    member::{Member, Taken},
    metric::Metric,
    reading::{Reading, Sample},
    table::metric,
};

/// How a monitor samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct MonitorSettings {
    /// How often each member is sampled. Default 10 s.
    pub interval: Duration,
    /// How long one reading may take; a member that does not answer for so long holds up nothing else. Default 5 s.
    pub deadline: Duration,
    /// From how long on an operation is shown in [`MemberView::slow_operations`]. Default 10 s.
    pub slow_operation: Duration,
    /// Whether the commands of slow operations are shown with the values in them, which may be anybody's data. Default false.
    pub show_values: bool,
    /// How long readings are kept for [`Monitor::summary`]. Default one hour.
    pub keep: Duration,
    /// How often databases and collections are looked at, and shards, and twice as often how latencies are distributed. Default 60 s; where that takes the server more
    /// than a hundredth of the time, more seldom.
    pub namespace_interval: Duration,
    /// How many databases and how many collections are shown: the largest of those, the busiest and largest of these. Default 25.
    pub namespaces: usize,
    /// How many series a collector may show of a member; what is more is left out and counted. Default 2000.
    pub series: usize,
}

impl Default for MonitorSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(10),
            deadline: Duration::from_secs(5),
            slow_operation: Duration::from_secs(10),
            show_values: false,
            keep: Duration::from_secs(3600),
            namespace_interval: Duration::from_secs(60),
            namespaces: 25,
            series: 2000,
        }
    }
}

impl MonitorSettings {
    fn check(&self) -> Result<()> {
        if self.interval.is_zero() || self.deadline.is_zero() || self.namespace_interval.is_zero() {
            return Err(Error::invalid("a monitor's intervals and deadline must be longer than nothing"));
        }
        if [self.interval, self.deadline, self.namespace_interval, self.slow_operation].into_iter().any(|time| time > LONGEST)
            || self.keep > LONGEST
        {
            return Err(Error::invalid("a monitor's intervals, deadline and history must not be longer than a year"));
        }
        Ok(())
    }

    /// What is older than this is no longer shown as if it were so now.
    fn stale_after(&self) -> Duration {
        self.interval * 3 + self.deadline
    }
}

/// Samples every member of a deployment in the background.
///
/// Each member, hidden ones and arbiters included, is asked through a direct connection of its own, by collectors that do not wait for each other.
/// Connections are named `mongo-monitor`; if the options have a name, that with `(mongo-monitor)` behind it.
///
/// Privileges: the role `clusterMonitor`, and `read` on the database `local` for the oplog. What may not be read is absent, and is
/// said once in the log and in [`MemberView::collectors`].
///
/// ```no_run
/// # async fn f() -> mongo_core::Result<()> {
/// use mongo_core::ConnectOptions;
/// use mongo_monitor::Monitor;
///
/// let monitor = Monitor::start(ConnectOptions::from_env()?, Default::default()).await?;
/// monitor.sampled().await;
/// println!("{}", monitor.view().to_open_metrics());
/// monitor.stop().await;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Monitor {
    shared: Arc<Shared>,
    /// Looks for members, and has the tasks of each.
    watching: tokio::task::JoinHandle<()>,
}

/// What the monitor and its tasks have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    client: Client,
    options: ClientOptions,
    pub(crate) settings: MonitorSettings,
    clock: Arc<dyn Clock>,
    members: RwLock<BTreeMap<String, Arc<Member>>>,
    stop: CancellationToken,
    alerts: Mutex<Option<Alerts>>,
    /// Watches the client that looks for members.
    watch: ClientWatch,
    /// What a client of the host does.
    included: Mutex<Option<ClientWatch>>,
    exports: Mutex<Vec<Export>>,
    /// Counts what was read, for who waits for it.
    rounds: watch::Sender<u64>,
}

/// All that was read last, of all members.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct View {
    /// When it was put together.
    pub at: DateTime,
    /// The members, by host.
    pub members: Vec<MemberView>,
    /// What the client of the host does that was [included](Monitor::include).
    #[serde(serialize_with = "crate::reading::with_labels")]
    pub client: Vec<Reading>,
}

/// What was read last of a member.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct MemberView {
    /// Its host and port.
    pub host: String,
    /// Whether it takes writes: it says that it is primary or, where that may not be asked, the driver takes it for one, or for a server by itself or a router.
    pub takes_writes: bool,
    /// How its collectors fare.
    pub collectors: Vec<CollectorView>,
    /// What was read, collector by collector. What is older than three intervals is left out.
    #[serde(serialize_with = "crate::reading::with_labels")]
    pub readings: Vec<Reading>,
    /// What has been under way for long, the longest first; fifty at most.
    pub slow_operations: Vec<SlowOperation>,
}

/// How a collector fares.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CollectorView {
    /// Its name: `up`, `server_status`, `replica_set`, `current_operations`, `latencies`, `namespaces` or `sharding`.
    pub name: String,
    /// How old what it has read is, in seconds. `None` before the first time.
    pub age_seconds: Option<f64>,
    /// How long it took, in seconds.
    pub took_seconds: Option<f64>,
    /// Why it could not read last time, or not all.
    pub failure: Option<String>,
}

impl View {
    /// Who takes writes: the primary of a set, or a server that is no member of one.
    pub fn primary(&self) -> Option<&MemberView> {
        self.members.iter().find(|member| member.takes_writes)
    }
}

impl MemberView {
    /// Whether it answered a ping last time.
    pub fn is_up(&self) -> bool {
        self.number("mongodb_up", &[]) == Some(1.0)
    }

    /// What it is doing in its replica set, as `PRIMARY`, and `DOWN` if it does not answer; none for who is of none, and where it is not known.
    pub fn state(&self) -> Option<&str> {
        let states = self.readings.iter().filter(|reading| reading.metric.name == "mongodb_member_state");
        states.filter(|reading| reading.as_number() > 0.0).find_map(|reading| reading.label("state"))
    }

    /// The readings of a metric.
    pub fn readings_of<'a>(&'a self, metric: &'a Metric) -> impl Iterator<Item = &'a Reading> + 'a {
        self.readings.iter().filter(move |reading| reading.metric == metric)
    }

    /// The number of a metric with these values of labels, in their order.
    pub fn number(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let found = self.readings.iter().find(|reading| reading.metric.name == name && reading.labels.iter().eq(labels.iter()));
        found.map(Reading::as_number)
    }
}

impl Monitor {
    /// Begins to sample. Members that are down are no error: they are shown as such.
    ///
    /// # Errors
    /// `InvalidInput` for settings without sense, and for options that the driver refuses.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing running.
    pub async fn start(options: ConnectOptions, settings: MonitorSettings) -> Result<Self> {
        Self::start_with_clock(options, settings, Arc::new(SystemClock::new())).await
    }

    /// The same, by another clock. Waiting is done by tokio's.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    ///
    /// # Cancel safety
    /// As [`start`](Self::start).
    pub async fn start_with_clock(options: ConnectOptions, settings: MonitorSettings, clock: Arc<dyn Clock>) -> Result<Self> {
        settings.check()?;
        let mut options = options.to_client_options().await?;
        // Never that of the host's own connections, as our own operations are left out of what is shown.
        options.app_name = Some(match options.app_name.as_deref() {
            None | Some("mongo-core") => "mongo-monitor".to_owned(),
            Some(name) => format!("{} (mongo-monitor)", name.chars().take(64).collect::<String>()),
        });
        options.server_selection_timeout = Some(settings.deadline);
        options.connect_timeout = Some(settings.deadline);
        let watch = ClientWatch::with_clock(Arc::clone(&clock)).with_operations(false);
        let mut watched = options.clone();
        watch.attach(&mut watched);
        let client = Client::with_options(watched).map_err(Error::from)?;
        let shared = Arc::new(Shared {
            client,
            options,
            settings,
            clock,
            members: RwLock::default(),
            stop: CancellationToken::new(),
            alerts: Mutex::default(),
            watch,
            included: Mutex::default(),
            exports: Mutex::default(),
            rounds: watch::Sender::new(0),
        });
        let watching = tokio::spawn(Arc::clone(&shared).watch());
        Ok(Self { shared, watching })
    }

    /// Waits until every member that is known has been asked once by every collector.
    ///
    /// # Cancel safety
    /// Dropping the future does nothing.
    pub async fn sampled(&self) {
        let mut rounds = self.shared.rounds.subscribe();
        loop {
            rounds.mark_unchanged();
            let members = self.shared.members();
            let all_asked = members.iter().all(|member| member.was_asked_all());
            if !members.is_empty() && all_asked || rounds.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until something is read anew from now on, of whichever member.
    ///
    /// # Cancel safety
    /// Dropping the future does nothing.
    pub async fn changed(&self) {
        // The other end is ours, so it cannot be gone.
        let _ = self.shared.rounds.subscribe().changed().await;
    }

    /// What was read last. Asks nobody: it takes as long as copying it.
    pub fn view(&self) -> View {
        self.shared.view()
    }

    /// What a metric of a member was over the newest while; `labels` are the values of its labels in their order.
    ///
    /// `None` for a member or a metric that is not known, and if it was not read in that while.
    pub fn summary(&self, host: &str, name: &str, labels: &[&str], last: Duration) -> Option<Summary> {
        let members = lock::read(&self.shared.members);
        lock(&members.get(host)?.history).summary(metric(name)?, labels, last)
    }

    /// Has alerts evaluated in every round from now on, in place of those it had.
    pub fn alert(&self, alerts: Alerts) {
        *lock(&self.shared.alerts) = Some(alerts);
    }

    /// What is pending and what fires, of the alerts that were given to [`alert`](Self::alert).
    pub fn alerts(&self) -> Vec<Alert> {
        lock(&self.shared.alerts).as_ref().map(Alerts::active).unwrap_or_default()
    }

    /// Works with the alerts that were given to [`alert`](Self::alert): to silence some, or to save their state. Nothing else may be asked of the monitor meanwhile.
    pub fn with_alerts<T>(&self, work: impl FnOnce(&mut Alerts) -> T) -> Option<T> {
        lock(&self.shared.alerts).as_mut().map(work)
    }

    /// The failovers that were noticed since the monitor was started, the newest last; of many the newest 256.
    pub fn failovers(&self) -> Vec<FailoverEvent> {
        self.shared.watch.failovers()
    }

    /// Has this one told of failovers as they are noticed, from now on.
    pub fn tell_failovers(&self, sink: Arc<dyn FailoverSink>) {
        self.shared.watch.tell(sink);
    }

    /// Shows what a client of the host does beside what the servers do, in place of what was included before.
    pub fn include(&self, client: ClientWatch) {
        *lock(&self.shared.included) = Some(client);
    }

    /// Hands every reading on in each round, from now on: into a host's own metrics.
    ///
    /// Not handed on is what is of single databases and collections, as sinks keep every series for ever: those are in [`view`](Self::view).
    /// Counters are handed on by what they grew, the first time by nothing. Of histograms there are their count and sum, as `…_count_total` and
    /// `…_sum_total`, as a sink takes single values only.
    pub fn export(&self, sink: Arc<dyn MetricsSink>) {
        lock(&self.shared.exports).push(Export::to(sink));
    }

    /// The points of every series of a metric, of all members. What was read at once stands at the same distance from `now`.
    pub(crate) fn points(&self, metric: &Metric, last: Duration, now: Duration) -> Vec<(String, Vec<String>, Vec<Point>)> {
        let members = self.shared.members();
        let of = |member: &Arc<Member>| {
            let points = lock(&member.history).points(metric, last, now, self.shared.settings.stale_after());
            let host = member.host.clone();
            points.into_iter().map(move |(labels, points)| (host.clone(), labels, points))
        };
        members.iter().flat_map(of).collect()
    }

    /// What every series of a member was over the newest while of a length.
    pub(crate) fn summaries(&self, host: &str, last: Duration) -> Vec<(&'static Metric, Vec<String>, Summary)> {
        let members = lock::read(&self.shared.members);
        members.get(host).map(|member| lock(&member.history).summaries(last)).unwrap_or_default()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Shared {
    /// The time by both hands of the clock.
    pub(crate) fn now(&self) -> (Duration, DateTime) {
        (self.clock.monotonic(), DateTime::from_system_time(self.clock.wall()))
    }

    /// What a member's series of a metric that are wanted were over the newest while of a length.
    pub(crate) fn current(
        &self,
        host: &str,
        metric: &Metric,
        last: Duration,
        is_wanted: impl Fn(&[String]) -> bool,
    ) -> Vec<(Vec<String>, Summary)> {
        let members = lock::read(&self.members);
        let Some(member) = members.get(host) else { return Vec::new() };
        let stale_after = member.stale_after(metric.name).unwrap_or_default();
        lock(&member.history).current(metric, last, stale_after, is_wanted)
    }

    pub(crate) fn view(&self) -> View {
        let now = self.clock.monotonic();
        let writable = self.watch.writable();
        let members = self.members().iter().map(|member| member.view(now, writable.contains(&member.host))).collect();
        let client = lock(&self.included).as_ref().map(ClientWatch::readings).unwrap_or_default();
        View { at: DateTime::from_system_time(self.clock.wall()), members, client }
    }
}

impl Monitor {
    /// Stops, and closes all connections.
    pub async fn stop(mut self) {
        self.shared.stop.cancel();
        if let Err(error) = (&mut self.watching).await {
            tracing::error!(%error, "a monitor ended otherwise than by being stopped");
        }
        for member in self.shared.members() {
            member.client.clone().shutdown().immediate(true).await;
        }
        self.shared.client.clone().shutdown().immediate(true).await;
    }
}

impl Drop for Monitor {
    /// Whoever drops a monitor without stopping it leaves nothing running either; only nobody waits for it.
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

impl Shared {
    /// How our own connections name themselves.
    fn own_name(&self) -> &str {
        self.options.app_name.as_deref().unwrap_or_default()
    }

    fn members(&self) -> Vec<Arc<Member>> {
        lock::read(&self.members).values().cloned().collect()
    }

    /// Looks who is there, now and then, and has everybody sampled.
    async fn watch(self: Arc<Self>) {
        let mut sampling = JoinSet::new();
        let mut changes = self.watch.changes();
        let mut ticks = tokio::time::interval(self.settings.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The seeds may name members otherwise than the set does; of what answers nothing they are all that is known.
        let found = changes.wait_for(|_| self.watch.has_found_somebody());
        tokio::select! {
            () = self.stop.cancelled() => {}
            _ = tokio::time::timeout(self.settings.deadline, found) => {}
        }
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                // Whoever is new is looked at without delay. The other end is ours, so it cannot be gone.
                _ = changes.changed() => {}
                _ = ticks.tick() => {}
            }
            self.take_up(self.known_hosts(), &mut sampling);
            // Also, and above all, when nobody answers.
            let news = lock(&self.alerts).as_mut().map(|alerts| alerts.evaluate_in(&self));
            // A sink may ask for the alerts, so they must not be held meanwhile.
            if let Some(news) = news {
                unharmed("an alert sink", || news.tell());
            }
            self.hand_on();
            while let Some(ended) = sampling.try_join_next() {
                if let Err(error) = ended {
                    tracing::error!(%error, "a collector ended otherwise than by being stopped, and no longer reads its member");
                }
            }
        }
        for member in self.members() {
            member.stop.cancel();
        }
        while sampling.join_next().await.is_some() {}
    }

    /// Hands what was read to whoever wants it.
    fn hand_on(&self) {
        // A sink may ask for anything, so nothing may be held meanwhile.
        let mut exports = std::mem::take(&mut *lock(&self.exports));
        if exports.is_empty() {
            return;
        }
        let view = self.view();
        for export in &mut exports {
            unharmed("a metrics sink", || export.take(&view));
        }
        let mut kept = lock(&self.exports);
        exports.append(&mut kept);
        *kept = exports;
    }

    /// The members of the deployment: those that the driver knows, and the hidden ones, of which only the others tell. Nobody is asked for it.
    fn known_hosts(&self) -> BTreeSet<String> {
        let seeds = || self.options.hosts.iter().map(ToString::to_string).collect();
        // Before it has found anybody, and of what is no set, it knows the seeds only.
        let Some(mut hosts) = self.watch.members_of_set() else { return seeds() };
        if self.options.direct_connection == Some(true) {
            return seeds();
        }
        let now = self.clock.monotonic();
        let members = self.members();
        let told: BTreeSet<String> = members.iter().flat_map(|member| member.told_members(now)).collect();
        // While nobody tells who is hidden, nobody who was known is gone.
        if told.is_empty() {
            hosts.extend(members.iter().map(|member| member.host.clone()));
        }
        hosts.extend(told);
        hosts
    }

    /// Whether the members that are known are all of the deployment.
    pub(crate) fn knows_members(&self) -> bool {
        let members = lock::read(&self.members);
        let told = self.watch.members_of_set().unwrap_or_default();
        self.watch.has_found_somebody() && !members.is_empty() && told.iter().all(|host| members.contains_key(host))
    }

    /// Whether all that there is of a metric of a member has been read just now.
    pub(crate) fn is_read_whole(&self, host: &str, metric: &str) -> bool {
        let members = lock::read(&self.members);
        members.get(host).is_some_and(|member| member.is_read_whole(metric, self.clock.monotonic()))
    }

    /// Begins to sample who is new, and no longer samples who is gone.
    fn take_up(self: &Arc<Self>, hosts: BTreeSet<String>, sampling: &mut JoinSet<()>) {
        let mut members = lock::write(&self.members);
        members.retain(|host, member| {
            let stays = hosts.contains(host);
            if !stays {
                member.stop.cancel();
            }
            stays
        });
        for host in hosts {
            if members.contains_key(&host) {
                continue;
            }
            let member = match self.member(&host) {
                Ok(member) => Arc::new(member),
                Err(error) => {
                    tracing::warn!(host, error = %error.report(), "a member cannot be sampled");
                    continue;
                }
            };
            for collector in Collector::ALL {
                sampling.spawn(Arc::clone(self).sample(Arc::clone(&member), collector));
            }
            members.insert(host, member);
        }
    }

    fn member(&self, host: &str) -> Result<Member> {
        let mut options = self.options.clone();
        options.hosts = vec![ServerAddress::parse(host)?];
        options.direct_connection = Some(true);
        options.load_balanced = None;
        options.repl_set_name = None;
        options.min_pool_size = None;
        // One for each collector: none waits for another's connection.
        options.max_pool_size = u32::try_from(Collector::ALL.len()).ok();
        let client = Client::with_options(options).map_err(Error::from)?;
        Ok(Member::new(host, client, &self.settings, self.clock.monotonic(), self.stop.child_token()))
    }

    /// Has a collector read a member, again and again.
    async fn sample(self: Arc<Self>, member: Arc<Member>, collector: Collector) {
        let mut reader = Reader::new(collector);
        let clock = || self.clock.monotonic();
        loop {
            let begun = clock();
            let turn = Instant::now();
            let deadline = collector.deadline(&self.settings);
            let collected = tokio::select! {
                () = member.stop.cancelled() => return,
                collected = tokio::time::timeout(deadline, reader.read(member.asked(&self.settings, self.own_name(), &clock))) => collected,
            };
            let now = clock();
            let took = now.saturating_sub(begun);
            let (mut at, mut is_answer, mut waited) = (None, true, Duration::ZERO);
            let mut slow_operations = Vec::new();
            let (epoch, readings, failure) = match collected {
                Ok(Ok(collected)) => {
                    slow_operations = collected.slow_operations;
                    (at, is_answer, waited) = (collected.at, collected.is_answer, collected.waited);
                    (collected.epoch, Some(collected.readings), collected.lacking)
                }
                Ok(Err(error)) if error.kind() == ErrorKind::Unauthorized => {
                    (None, None, Some(format!("not allowed, the role clusterMonitor would be enough: {}", error.report())))
                }
                Ok(Err(error)) => (None, None, Some(error.report())),
                Err(_) => (None, None, Some(format!("no answer within {deadline:?}"))),
            };
            let has_answered = readings.is_some();
            if has_answered && is_answer {
                member.answered.send_replace(Some(Instant::now()));
            }
            let mut readings = readings.unwrap_or_else(|| collector.without_answer());
            let dropped = readings.len().saturating_sub(self.settings.series);
            readings.truncate(self.settings.series);
            let taken = DateTime::from_system_time(self.clock.wall());
            let sample = Sample { taken, at: at.unwrap_or(now), epoch, readings };
            // Waiting for who does not answer costs him nothing.
            let cost = if has_answered { took.saturating_sub(waited) } else { Duration::ZERO };
            let interval = collector.interval(&self.settings, cost);
            let stale_after = collector.stale_after(&self.settings, cost);
            member.take(collector, Taken { sample, slow_operations, has_answered, took, failure, dropped, stale_after });
            self.rounds.send_modify(|rounds| *rounds += 1);
            tokio::select! {
                () = member.stop.cancelled() => return,
                () = tokio::time::sleep_until(turn + interval) => {}
            }
        }
    }
}

/// Calls what belongs to the host: if that panics, the monitor goes on.
fn unharmed(what: &'static str, call: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err() {
        tracing::error!("{what} has panicked; the monitor goes on");
    }
}

const LONGEST: Duration = Duration::from_secs(366 * 86_400);
