//! One member of a deployment: what its collectors have read, and how they fare.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Mutex,
    time::Duration,
};

use mongo_core::{CancellationToken, lock::lock, mongodb::Client};
use tokio::{sync::watch, time::Instant};

use crate::{
    collector::{Asked, Collector},
    current_operations::SlowOperation,
    diagnostics::Diagnostics,
    history::History,
    monitor::{CollectorView, MemberView, MonitorSettings},
    reading::{Reading, Sample, reading},
    replica_set,
};

pub(crate) struct Member {
    pub(crate) host: String,
    pub(crate) client: Client,
    slots: BTreeMap<Collector, Mutex<Slot>>,
    pub(crate) history: Mutex<History>,
    diagnostics: Diagnostics,
    /// When it answered a collector last.
    pub(crate) answered: watch::Sender<Option<Instant>>,
    /// Which collector has read a metric.
    read_by: Mutex<HashMap<&'static str, Collector>>,
    /// Since when it has been watched, by the clock that samples are dated with.
    since: Duration,
    pub(crate) stop: CancellationToken,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("host", &self.host).finish_non_exhaustive()
    }
}

/// What a collector has read of a member.
#[derive(Debug)]
struct Slot {
    sample: Option<Sample>,
    took: Option<Duration>,
    failure: Option<String>,
    slow_operations: Vec<SlowOperation>,
    attempts: u64,
    /// What was left out because there was too much of it.
    dropped: usize,
    /// From which age on what was read is no longer shown.
    stale_after: Duration,
}

/// What came of one reading.
pub(crate) struct Taken {
    pub(crate) sample: Sample,
    pub(crate) slow_operations: Vec<SlowOperation>,
    pub(crate) has_answered: bool,
    pub(crate) took: Duration,
    pub(crate) failure: Option<String>,
    pub(crate) dropped: usize,
    pub(crate) stale_after: Duration,
}

impl Member {
    pub(crate) fn new(host: &str, client: Client, settings: &MonitorSettings, since: Duration, stop: CancellationToken) -> Self {
        let slot = |collector: Collector| Slot {
            sample: None,
            took: None,
            failure: None,
            slow_operations: Vec::new(),
            attempts: 0,
            dropped: 0,
            stale_after: collector.stale_after(settings, Duration::ZERO),
        };
        Self {
            host: host.to_owned(),
            client,
            slots: Collector::ALL.into_iter().map(|collector| (collector, Mutex::new(slot(collector)))).collect(),
            history: Mutex::new(History::new(settings.keep)),
            diagnostics: Diagnostics::default(),
            answered: watch::Sender::new(None),
            read_by: Mutex::default(),
            since,
            stop,
        }
    }

    pub(crate) fn asked<'a>(
        &'a self,
        settings: &'a MonitorSettings,
        own_name: &'a str,
        now: &'a (dyn Fn() -> Duration + Send + Sync),
    ) -> Asked<'a> {
        let (client, diagnostics, answered) = (&self.client, &self.diagnostics, self.answered.subscribe());
        Asked { client, diagnostics, answered, settings, own_name, now }
    }

    /// Whether every collector has tried once.
    pub(crate) fn was_asked_all(&self) -> bool {
        self.slots.values().all(|slot| lock(slot).attempts > 0)
    }

    pub(crate) fn take(&self, collector: Collector, taken: Taken) {
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
        if !has_answered && sample.readings.is_empty() {
            return;
        }
        lock(&self.history).record(&sample);
        lock(&self.read_by).extend(sample.readings.iter().map(|reading| (reading.metric.name, collector)));
        slot.slow_operations = slow_operations;
        slot.dropped = dropped;
        slot.stale_after = stale_after;
        slot.sample = Some(sample);
    }

    /// Whether all that there is of a metric has been read just now: what is not among it then is not there, instead of not being known.
    pub(crate) fn is_read_whole(&self, metric: &str, now: Duration) -> bool {
        let Some(collector) = lock(&self.read_by).get(metric).copied() else { return false };
        let Some(slot) = self.slots.get(&collector).map(lock) else { return false };
        slot.failure.is_none() && slot.dropped == 0 && slot.fresh(now).is_some()
    }

    /// From which age on a metric's series are no longer shown.
    pub(crate) fn stale_after(&self, metric: &str) -> Option<Duration> {
        let collector = lock(&self.read_by).get(metric).copied()?;
        Some(lock(self.slots.get(&collector)?).stale_after)
    }

    /// The members of its set, as it told them last; none if it did not lately.
    pub(crate) fn told_members(&self, now: Duration) -> Vec<String> {
        let Some(slot) = self.slots.get(&Collector::ReplicaSet).map(lock) else { return Vec::new() };
        let told = slot.fresh(now).into_iter().flat_map(|sample| sample.of("mongodb_replica_member_health"));
        told.filter_map(|reading| reading.label("member").map(str::to_owned)).collect()
    }

    /// What was read last; `takes_writes` is what the driver takes it for.
    pub(crate) fn view(&self, now: Duration, takes_writes: bool) -> MemberView {
        let mut view = MemberView {
            host: self.host.clone(),
            takes_writes: false,
            collectors: Vec::new(),
            readings: Vec::new(),
            slow_operations: Vec::new(),
        };
        let mut is_of_set = false;
        for (collector, slot) in &self.slots {
            let slot = lock(slot);
            if let Some(sample) = slot.fresh(now) {
                view.readings.extend(sample.readings.iter().cloned());
                view.slow_operations.extend(slot.slow_operations.iter().cloned());
            }
            is_of_set |= slot.sample.as_ref().is_some_and(|sample| sample.of("mongodb_member_state").next().is_some());
            view.readings.extend(self.own_readings(*collector, &slot, now));
            view.collectors.push(CollectorView {
                name: collector.to_string(),
                age_seconds: slot.age(now).map(|age| age.as_secs_f64()),
                took_seconds: slot.took.map(|took| took.as_secs_f64()),
                failure: slot.failure.clone(),
            });
        }
        if view.is_up() {
            view.takes_writes = view.state().map_or(takes_writes, |state| state == "PRIMARY");
        } else if is_of_set {
            // What it said last is no longer so.
            view.readings.retain(|reading| reading.metric.name != "mongodb_member_state");
            view.readings.extend(replica_set::down());
        }
        view
    }

    /// How a collector fares, as readings.
    #[expect(clippy::cast_precision_loss, reason = "a count of series")]
    fn own_readings(&self, collector: Collector, slot: &Slot, now: Duration) -> impl Iterator<Item = Reading> + use<> {
        let name = collector.to_string();
        let age = slot.age(now);
        // Who never read anything is as old as the watch.
        let waited = age.unwrap_or_else(|| now.saturating_sub(self.since));
        let series = slot.fresh(now).map_or(0, |sample| sample.readings.len());
        let readings = [
            ("mongodb_monitor_snapshot_age_seconds", age.map(|age| age.as_secs_f64())),
            ("mongodb_monitor_overdue_ratio", Some(waited.as_secs_f64() / slot.stale_after.as_secs_f64())),
            ("mongodb_monitor_collect_duration_seconds", slot.took.map(|took| took.as_secs_f64())),
            ("mongodb_monitor_series", Some(series as f64)),
            ("mongodb_monitor_series_dropped", Some(slot.dropped as f64)),
        ];
        readings.into_iter().filter_map(move |(metric, value)| reading(metric, &[&name], value?))
    }
}

impl Slot {
    fn age(&self, now: Duration) -> Option<Duration> {
        self.sample.as_ref().map(|sample| now.saturating_sub(sample.at))
    }

    /// What was read last, if it is not too old to be shown.
    fn fresh(&self, now: Duration) -> Option<&Sample> {
        self.sample.as_ref().filter(|sample| now.saturating_sub(sample.at) <= self.stale_after)
    }
}
