//! The monitor: it samples every member in the background and shows what was read last, with its age.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use mongo_core::{
    CancellationToken, ConnectOptions, Error, ErrorKind, Result,
    bson::{Bson, DateTime, doc},
    clock::{Clock, SystemClock},
    metrics::MetricsSink,
    mongodb::{
        Client,
        options::{ClientOptions, ReadPreference, SelectionCriteria, ServerAddress},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::{
    alert::{Alert, Alerts},
    client_watch::ClientWatch,
    collector::{Collector, Reader},
    current_operations::SlowOperation,
    export::Export,
    failover::{FailoverEvent, FailoverSink},
    history::{History, Point, Summary},
    metric::Metric,
    reading::{Reading, Sample, reading},
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
    /// How often databases and collections are looked at, and shards. Default 60 s; where that takes the server more than a hundredth of the time, more seldom.
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
/// Connections are named `mongo-monitor`, unless the options name them.
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
    rounds: tokio::sync::watch::Sender<u64>,
}

/// One member.
struct Member {
    host: String,
    client: Client,
    slots: BTreeMap<Collector, Mutex<Slot>>,
    history: Mutex<History>,
    stop: CancellationToken,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("host", &self.host).finish_non_exhaustive()
    }
}

/// What a collector has read of a member.
#[derive(Debug, Default)]
struct Slot {
    sample: Option<Sample>,
    took: Option<Duration>,
    failure: Option<String>,
    slow_operations: Vec<SlowOperation>,
    attempts: u64,
    /// What was left out because there was too much of it.
    dropped: usize,
    /// From which age on it is no longer shown.
    stale_after: Duration,
}

/// What came of one reading.
struct Taken {
    sample: Sample,
    slow_operations: Vec<SlowOperation>,
    has_answered: bool,
    took: Duration,
    failure: Option<String>,
    dropped: usize,
    stale_after: Duration,
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
    /// Its name: `up`, `server_status`, `replica_set`, `current_operations`, `namespaces` or `sharding`.
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
        self.members.iter().find(|member| member.is_up() && member.state().is_none_or(|state| state == "PRIMARY"))
    }
}

impl MemberView {
    /// Whether it answered a ping last time.
    pub fn is_up(&self) -> bool {
        self.number("mongodb_up", &[]) == Some(1.0)
    }

    /// What it is doing in its replica set, as `PRIMARY`; none for who is of none, and where it is not known.
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
        if options.app_name.as_deref().is_none_or(|name| name == "mongo-core") {
            options.app_name = Some("mongo-monitor".to_owned());
        }
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
            rounds: tokio::sync::watch::Sender::new(0),
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
            let all_asked = members.iter().all(|member| member.slots.values().all(|slot| lock(slot).attempts > 0));
            if !members.is_empty() && all_asked || rounds.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until something was read anew, of whichever member.
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
        let members = self.shared.members.read().unwrap_or_else(PoisonError::into_inner);
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

    /// Works with the alerts that were given to [`alert`](Self::alert): to silence some, or to save their state.
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
    /// Counters are handed on by what they grew, the first time by nothing. Of histograms there are their count and sum, as `…_count_total` and
    /// `…_sum_total`, as a sink takes single values only.
    pub fn export(&self, sink: Arc<dyn MetricsSink>) {
        lock(&self.shared.exports).push(Export::to(sink));
    }

    /// The points of every series of a metric, of all members.
    pub(crate) fn points(&self, metric: &Metric, last: Duration) -> Vec<(String, Vec<String>, Vec<Point>)> {
        let members = self.shared.members();
        let of = |member: &Arc<Member>| {
            let points =
                lock(&member.history).points(metric, last, self.shared.clock.monotonic(), self.shared.settings.stale_after());
            let host = member.host.clone();
            points.into_iter().map(move |(labels, points)| (host.clone(), labels, points))
        };
        members.iter().flat_map(of).collect()
    }

    /// What every series of a member was over the newest while of a length.
    pub(crate) fn summaries(&self, host: &str, last: Duration) -> Vec<(&'static Metric, Vec<String>, Summary)> {
        let members = self.shared.members.read().unwrap_or_else(PoisonError::into_inner);
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
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        let Some(member) = members.get(host) else { return Vec::new() };
        lock(&member.history).current(metric, last, self.settings.stale_after(), is_wanted)
    }

    pub(crate) fn view(&self) -> View {
        let now = self.clock.monotonic();
        let members = self.members().iter().map(|member| member.view(now)).collect();
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
        self.members.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Looks who is there, now and then, and has everybody sampled.
    async fn watch(self: Arc<Self>) {
        let mut sampling = JoinSet::new();
        let mut ticks = tokio::time::interval(self.settings.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            let found = tokio::select! {
                () = self.stop.cancelled() => break,
                found = tokio::time::timeout(self.settings.deadline, self.find_members()) => found,
            };
            match found.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "no answer in time"))) {
                Ok(hosts) => self.take_up(hosts, &mut sampling),
                Err(error) => {
                    tracing::debug!(error = %error.report(), "the members cannot be asked for");
                    // Who is known stays known. Before anybody is, those are asked who are named in the options, and found to be down.
                    if self.members().is_empty() {
                        self.take_up(self.options.hosts.iter().map(ToString::to_string).collect(), &mut sampling);
                    }
                }
            }
            // Also, and above all, when nobody answers.
            let news = lock(&self.alerts).as_mut().map(|alerts| alerts.evaluate_in(&self));
            // A sink may ask for the alerts, so they must not be held meanwhile.
            if let Some(news) = news {
                news.tell();
            }
            self.hand_on();
            while sampling.try_join_next().is_some() {}
        }
        for member in self.members() {
            member.stop.cancel();
        }
        while sampling.join_next().await.is_some() {}
    }

    /// Hands what was read to whoever wants it.
    fn hand_on(&self) {
        let mut exports = lock(&self.exports);
        if !exports.is_empty() {
            let view = self.view();
            exports.iter_mut().for_each(|export| export.take(&view));
        }
    }

    /// The members of the deployment, as it tells them.
    async fn find_members(&self) -> Result<BTreeSet<String>> {
        let seeds = || self.options.hosts.iter().map(ToString::to_string).collect();
        if self.options.direct_connection == Some(true) {
            return Ok(seeds());
        }
        let admin = self.client.database("admin");
        let nearest = SelectionCriteria::ReadPreference(ReadPreference::Nearest { options: Default::default() });
        let hello = admin.run_command(doc! { "hello": 1 }).selection_criteria(nearest.clone()).await?;
        if !hello.contains_key("setName") {
            return Ok(seeds());
        }
        let mut hosts: BTreeSet<String> = BTreeSet::new();
        for list in ["hosts", "passives", "arbiters"] {
            hosts.extend(hello.get_array(list).into_iter().flatten().filter_map(Bson::as_str).map(str::to_owned));
        }
        // Hidden members only those see who may see the status. Any other failure must not make them look as if they were gone.
        match admin.run_command(doc! { "replSetGetStatus": 1 }).selection_criteria(nearest).await.map_err(Error::from) {
            Ok(status) => {
                let members = status.get_array("members").into_iter().flatten().filter_map(Bson::as_document);
                hosts.extend(members.filter_map(|member| member.get_str("name").ok()).map(str::to_owned));
            }
            Err(error) if error.kind() == ErrorKind::Unauthorized => {}
            Err(error) => return Err(error),
        }
        Ok(hosts)
    }

    /// Begins to sample who is new, and no longer samples who is gone.
    fn take_up(self: &Arc<Self>, hosts: BTreeSet<String>, sampling: &mut JoinSet<()>) {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
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
        Ok(Member {
            host: host.to_owned(),
            client,
            slots: Collector::ALL.into_iter().map(|collector| (collector, Mutex::default())).collect(),
            history: Mutex::new(History::new(self.settings.keep)),
            stop: self.stop.child_token(),
        })
    }

    /// Has a collector read a member, again and again.
    async fn sample(self: Arc<Self>, member: Arc<Member>, collector: Collector) {
        let mut reader = Reader::new(collector);
        loop {
            let begun = self.clock.monotonic();
            let turn = tokio::time::Instant::now();
            let deadline = collector.deadline(&self.settings);
            let collected = tokio::select! {
                () = member.stop.cancelled() => return,
                collected = tokio::time::timeout(deadline, reader.read(&member.client, &self.settings, self.own_name())) => collected,
            };
            let now = self.clock.monotonic();
            let took = now.saturating_sub(begun);
            let mut slow_operations = Vec::new();
            let (epoch, readings, failure) = match collected {
                Ok(Ok(collected)) => {
                    slow_operations = collected.slow_operations;
                    (collected.epoch, Some(collected.readings), collected.lacking)
                }
                Ok(Err(error)) if error.kind() == ErrorKind::Unauthorized => {
                    (None, None, Some(format!("not allowed, the role clusterMonitor would be enough: {}", error.report())))
                }
                Ok(Err(error)) => (None, None, Some(error.report())),
                Err(_) => (None, None, Some(format!("no answer within {deadline:?}"))),
            };
            let has_answered = readings.is_some();
            let mut readings = readings.unwrap_or_else(|| collector.without_answer());
            let dropped = readings.len().saturating_sub(self.settings.series);
            readings.truncate(self.settings.series);
            let taken = DateTime::from_system_time(self.clock.wall());
            let sample = Sample { taken, at: now, epoch, readings };
            let interval = collector.interval(&self.settings, took);
            let stale_after = interval * 3 + deadline;
            member.take(collector, Taken { sample, slow_operations, has_answered, took, failure, dropped, stale_after });
            self.rounds.send_modify(|rounds| *rounds += 1);
            tokio::select! {
                () = member.stop.cancelled() => return,
                () = tokio::time::sleep_until(turn + interval) => {}
            }
        }
    }
}

impl Member {
    fn take(&self, collector: Collector, taken: Taken) {
        let Taken { sample, slow_operations, has_answered, took, failure, dropped, stale_after } = taken;
        let Some(slot) = self.slots.get(&collector) else { return };
        let mut slot = lock(slot);
        // What goes on failing is said once.
        if let Some(failure) = failure.as_ref().filter(|failure| slot.failure.as_ref() != Some(failure)) {
            tracing::warn!(host = self.host, %collector, failure, "a member cannot be read, or not all of it");
        }
        slot.attempts += 1;
        slot.failure = failure;
        slot.took = Some(took);
        slot.slow_operations = slow_operations;
        slot.dropped = dropped;
        slot.stale_after = stale_after;
        if has_answered || !sample.readings.is_empty() {
            lock(&self.history).record(&sample);
            slot.sample = Some(sample);
        }
    }

    fn view(&self, now: Duration) -> MemberView {
        let mut view =
            MemberView { host: self.host.clone(), collectors: Vec::new(), readings: Vec::new(), slow_operations: Vec::new() };
        for (collector, slot) in &self.slots {
            let slot = lock(slot);
            let age = slot.sample.as_ref().map(|sample| now.saturating_sub(sample.at));
            let mut series = 0;
            if let Some(sample) = slot.sample.as_ref().filter(|_| age.is_some_and(|age| age <= slot.stale_after)) {
                series = sample.readings.len();
                view.readings.extend(sample.readings.iter().cloned());
                view.slow_operations.extend(slot.slow_operations.iter().cloned());
            }
            let name = collector.to_string();
            let seconds = |duration: Option<Duration>| duration.map(|duration| duration.as_secs_f64());
            #[expect(clippy::cast_precision_loss, reason = "a count of series")]
            let ours = [
                ("mongodb_monitor_snapshot_age_seconds", seconds(age)),
                ("mongodb_monitor_collect_duration_seconds", seconds(slot.took)),
                ("mongodb_monitor_series", Some(series as f64)),
                ("mongodb_monitor_series_dropped", Some(slot.dropped as f64)),
            ];
            view.readings.extend(ours.into_iter().filter_map(|(metric, value)| reading(metric, &[&name], value?)));
            view.collectors.push(CollectorView {
                name: collector.to_string(),
                age_seconds: age.map(|age| age.as_secs_f64()),
                took_seconds: slot.took.map(|took| took.as_secs_f64()),
                failure: slot.failure.clone(),
            });
        }
        view
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
