//! Readings of a member's view of its replica set.

use std::time::Duration;

use mongo_core::replica_set::{MemberState, ReplicaSetStatus};

use crate::{reading::Reading, table::metric};

/// What a member says of its set.
pub(crate) fn read(status: &ReplicaSetStatus, window: Option<Duration>) -> Vec<Reading> {
    let mut readings = Vec::new();
    let mut push = |name: &str, label: Option<String>, value: f64| {
        if let Some(metric) = metric(name) {
            readings.push(Reading::number(metric, label.into_iter().collect(), value));
        }
    };
    let asked = status.members.iter().find(|member| member.is_asked);
    if let Some(asked) = asked {
        for state in STATES {
            push("mongodb_member_state", Some(state.to_string()), f64::from(u8::from(asked.state == state)));
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "elections are few")]
    push("mongodb_replica_term", None, status.term as f64);
    // Everybody tells the lag of everybody, each by what it has heard last: one of them must be believed.
    let is_primary = asked.is_some_and(|asked| asked.state == MemberState::Primary);
    for member in &status.members {
        let host = || Some(member.host.clone());
        push("mongodb_replica_member_health", host(), f64::from(u8::from(member.is_up)));
        if let Some(ping) = member.ping {
            push("mongodb_replica_ping_seconds", host(), ping.as_secs_f64());
        }
        if !is_primary || !member.is_up || member.is_asked {
            continue;
        }
        let Some(lag) = status.lag(member) else { continue };
        push("mongodb_replica_lag_seconds", host(), lag.as_secs_f64());
        if let Some(window) = window {
            push("mongodb_replication_headroom_seconds", host(), window.as_secs_f64() - lag.as_secs_f64());
        }
    }
    if let Some(window) = window {
        push("mongodb_oplog_window_seconds", None, window.as_secs_f64());
    }
    let position = |reading: &Reading| crate::METRICS.iter().position(|metric| metric == reading.metric);
    readings.sort_by_key(position);
    readings
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
