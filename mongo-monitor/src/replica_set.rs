//! Readings of a member's view of its replica set.

use std::{collections::BTreeMap, time::Duration};

use mongo_core::{
    bson::{DateTime, Document, Timestamp},
    replica_set::{MemberState, ReplicaSetStatus},
};

use crate::{
    collector::number,
    reading::{self, Reading, reading},
};

/// A member's oplog.
#[derive(Default)]
pub(crate) struct Oplog {
    /// From its oldest entry to its newest.
    pub(crate) window: Option<Duration>,
    pub(crate) size: OplogSize,
}

/// How large an oplog is, and may become.
#[derive(Clone, Copy, Default)]
pub(crate) struct OplogSize {
    used_bytes: Option<f64>,
    max_bytes: Option<f64>,
}

impl OplogSize {
    /// By the statistics of its collection.
    pub(crate) fn of(stats: &Document) -> Self {
        // From 7.0 on a server collects them by the stage that keeps them in a part of their own.
        let stats = stats.get_document("storageStats").unwrap_or(stats);
        let bytes = |name: &str| stats.get(name).and_then(number);
        Self { used_bytes: bytes("size"), max_bytes: bytes("maxSize") }
    }
}

/// By how much members are to be behind.
pub(crate) type Delays = BTreeMap<String, Duration>;

impl Oplog {
    /// Whether all of it is known.
    pub(crate) fn is_whole(&self) -> bool {
        self.window.is_some() && self.size.used_bytes.is_some() && self.size.max_bytes.is_some()
    }

    /// As a server's diagnostic data have it.
    pub(crate) fn of_diagnostics(data: &Document) -> Self {
        let end = |name: &str| data.get_document("serverStatus").ok()?.get_document("oplog").ok()?.get_timestamp(name).ok();
        let size = data.get_document("local.oplog.rs.stats").map(OplogSize::of).unwrap_or_default();
        Self { window: window(end("earliestOptime"), end("latestOptime")), size }
    }
}

/// From the oldest entry to the newest.
pub(crate) fn window(oldest: Option<Timestamp>, newest: Option<Timestamp>) -> Option<Duration> {
    let seconds = newest?.time.saturating_sub(oldest?.time);
    Some(Duration::from_secs(u64::from(seconds)))
}

/// What a member says of its set.
pub(crate) fn read(status: &ReplicaSetStatus, oplog: &Oplog, delays: &Delays) -> Vec<Reading> {
    let mut readings = Vec::new();
    let mut push = |name: &str, label: Option<&str>, value: f64| {
        readings.extend(reading(name, label.as_slice(), value));
    };
    let asked = status.members.iter().find(|member| member.is_asked);
    if let Some(asked) = asked {
        for state in STATES {
            push("mongodb_member_state", Some(&state.to_string()), f64::from(u8::from(asked.state == state)));
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "elections are few")]
    push("mongodb_replica_term", None, status.term as f64);
    for (name, reached) in
        [("mongodb_replica_majority_lag_seconds", status.majority_at), ("mongodb_replica_durable_lag_seconds", status.durable_at)]
    {
        if let Some(behind) = between(reached, status.applied_at) {
            push(name, None, behind.as_secs_f64());
        }
    }
    // Everybody tells the lag of everybody, each by what it has heard last: one of them must be believed.
    let is_primary = asked.is_some_and(|asked| asked.state == MemberState::Primary);
    // For how long nothing was written.
    let idle = between(status.applied_at, status.at).unwrap_or_default();
    // It is cut off in steps, so it is never quite full.
    let is_full = oplog.size.used_bytes.zip(oplog.size.max_bytes).is_some_and(|(used, max)| used >= max * 0.9);
    let full_window = oplog.window.filter(|_| is_full);
    for member in &status.members {
        let host = Some(&*member.host);
        push("mongodb_replica_member_health", host, f64::from(u8::from(member.is_up)));
        if let Some(ping) = member.ping {
            push("mongodb_replica_ping_seconds", host, ping.as_secs_f64());
        }
        if let Some(age) = between(member.heard_at, status.at) {
            push("mongodb_replica_heartbeat_age_seconds", host, age.as_secs_f64());
        }
        if !is_primary || !member.is_up || member.is_asked {
            continue;
        }
        let Some(lag) = status.lag(member) else { continue };
        push("mongodb_replica_lag_seconds", host, lag.as_secs_f64());
        let beyond = lag.saturating_sub(delays.get(&member.host).copied().unwrap_or_default());
        push("mongodb_replica_lag_beyond_delay_seconds", host, beyond.as_secs_f64());
        // What came last may be on its way, or a no-op of a set in which nothing happens.
        push("mongodb_replica_lag_writes_seconds", host, if idle > lag { 0.0 } else { lag.as_secs_f64() });
        if let Some(window) = full_window {
            push("mongodb_replication_headroom_seconds", host, window.as_secs_f64() - lag.as_secs_f64());
        }
    }
    if let Some(window) = oplog.window {
        push("mongodb_oplog_window_seconds", None, window.as_secs_f64());
    }
    if let Some(window) = full_window {
        push("mongodb_oplog_full_window_seconds", None, window.as_secs_f64());
    }
    for (kind, bytes) in [("used", oplog.size.used_bytes), ("max", oplog.size.max_bytes)] {
        if let Some(bytes) = bytes {
            push("mongodb_oplog_bytes", Some(kind), bytes);
        }
    }
    reading::sort(&mut readings);
    readings
}

/// From a time to a later one; nothing if it is not later.
fn between(earlier: Option<DateTime>, later: Option<DateTime>) -> Option<Duration> {
    let passed = later?.timestamp_millis() - earlier?.timestamp_millis();
    Some(Duration::from_millis(u64::try_from(passed).unwrap_or(0)))
}

/// The state of a member that does not answer.
pub(crate) fn down() -> impl Iterator<Item = Reading> {
    let states = STATES.into_iter();
    states.filter_map(|state| {
        reading("mongodb_member_state", &[&state.to_string()], f64::from(u8::from(state == MemberState::Down)))
    })
}

const STATES: [MemberState; 10] = [
    MemberState::Startup,
    MemberState::Primary,
    MemberState::Secondary,
    MemberState::Recovering,
    MemberState::Startup2,
    MemberState::Unknown,
    MemberState::Arbiter,
    MemberState::Down,
    MemberState::Rollback,
    MemberState::Removed,
];

#[cfg(test)]
mod tests {
    use mongo_core::bson::Bson;

    use super::*;

    /// Answers of real primaries, as they came: of a set of three of which one has just been killed.
    fn fixture(version: &str) -> ReplicaSetStatus {
        let path = format!("{}/fixtures/replica_set_status_{version}.json", env!("CARGO_MANIFEST_DIR"));
        let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let Bson::Document(document) = Bson::try_from(value).unwrap() else { unreachable!() };
        ReplicaSetStatus::from_reply(&document).unwrap()
    }

    #[test]
    fn every_version_tells_states_and_lag_and_of_who_is_dead_nothing_but_that() {
        for version in ["4.4", "5.0", "6.0"] {
            let status = fixture(version);
            let hosts: Vec<&str> = status.members.iter().map(|member| &*member.host).collect();
            let [_, alive, dead] = hosts[..] else { panic!("{hosts:?}") };
            let size = OplogSize { used_bytes: Some(95.0), max_bytes: Some(100.0) };
            let oplog = Oplog { window: Some(Duration::from_secs(100)), size };
            let delays = Delays::from([(alive.to_owned(), Duration::from_secs(3600))]);
            let readings = read(&status, &oplog, &delays);
            let number = |name: &str, labels: &[&str]| {
                let found = readings.iter().find(|of| of.metric.name == name && of.labels.iter().eq(labels.iter()));
                found.map(Reading::as_number)
            };
            assert_eq!(number("mongodb_member_state", &["PRIMARY"]), Some(1.0), "{version}");
            assert!(number("mongodb_replica_term", &[]).is_some_and(|term| term >= 1.0), "{version}");
            assert!(number("mongodb_replica_majority_lag_seconds", &[]).is_some_and(|lag| lag < 60.0), "{version}");
            assert!(number("mongodb_replica_durable_lag_seconds", &[]).is_some_and(|lag| lag < 60.0), "{version}");
            let health = |host: &str| number("mongodb_replica_member_health", &[host]);
            assert_eq!((health(alive), health(dead)), (Some(1.0), Some(0.0)), "{version}");
            let lag = number("mongodb_replica_lag_seconds", &[alive]).unwrap();
            assert!(lag < 60.0, "{version}");
            assert_eq!(number("mongodb_replica_lag_beyond_delay_seconds", &[alive]), Some(0.0), "{version}");
            assert_eq!(number("mongodb_replication_headroom_seconds", &[alive]), Some(100.0 - lag), "{version}");
            assert!(number("mongodb_replica_heartbeat_age_seconds", &[alive]).is_some(), "{version}");
            for name in
                ["mongodb_replica_lag_seconds", "mongodb_replica_lag_writes_seconds", "mongodb_replication_headroom_seconds"]
            {
                assert_eq!(number(name, &[dead]), None, "{version}: {name}");
            }
        }
    }

    #[test]
    fn headroom_is_told_once_the_oplog_is_full_and_the_size_is_found_where_each_version_has_it() {
        use mongo_core::bson::doc;
        let flat = OplogSize::of(&doc! { "size": 5, "maxSize": 100_i64 });
        let nested = OplogSize::of(&doc! { "storageStats": { "size": 5.0, "maxSize": 100 } });
        assert_eq!((flat.used_bytes, flat.max_bytes), (Some(5.0), Some(100.0)));
        assert_eq!((nested.used_bytes, nested.max_bytes), (Some(5.0), Some(100.0)));
        let young = Oplog { window: Some(Duration::from_secs(100)), size: flat };
        let readings = read(&fixture("6.0"), &young, &Delays::new());
        assert!(readings.iter().all(|of| of.metric.name != "mongodb_replication_headroom_seconds"));
        assert!(readings.iter().any(|of| of.metric.name == "mongodb_oplog_window_seconds"));
    }
}
