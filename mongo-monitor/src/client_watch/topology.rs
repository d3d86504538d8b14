//! Who a client takes the servers for.

use std::collections::{BTreeMap, BTreeSet};

use mongo_core::bson::oid::ObjectId;
use mongo_core::mongodb::{
    ServerInfo, ServerType, TopologyType,
    error::ErrorKind,
    event::sdam::{SdamEvent, TopologyDescription},
};

use super::distribution::Distribution;
use crate::{
    failover::{FailoverEvent, Failovers, Moment, Role, Seen},
    metric::Metric,
    reading::{Reading, Value, reading},
    table::metric,
};

#[derive(Debug, Default)]
pub(super) struct TopologyWatch {
    /// Whose events are taken in.
    topology: Option<ObjectId>,
    failovers: Failovers,
    states: BTreeMap<String, &'static str>,
    seen: Seen,
    heartbeats: BTreeMap<String, Heartbeats>,
}

#[derive(Debug, Default)]
struct Heartbeats {
    took: Distribution,
    failed: u64,
}

impl TopologyWatch {
    pub(super) fn take(&mut self, event: &SdamEvent, now: Moment) -> Vec<FailoverEvent> {
        match event {
            SdamEvent::TopologyOpening(opened) => drop(self.topology.get_or_insert(opened.topology_id)),
            SdamEvent::TopologyClosed(closed) if self.topology == Some(closed.topology_id) => *self = Self::default(),
            SdamEvent::TopologyDescriptionChanged(changed) if self.topology.is_none_or(|of| of == changed.topology_id) => {
                let new = &changed.new_description;
                self.states = new.servers().iter().map(|(address, server)| (address.to_string(), state(server))).collect();
                self.heartbeats.retain(|host, _| self.states.contains_key(host));
                self.seen = seen(new);
                return self.failovers.look(now, &self.seen);
            }
            // A heartbeat that waits for a change takes as long as nothing changes.
            SdamEvent::ServerHeartbeatSucceeded(event) if !event.awaited => {
                self.heartbeats.entry(event.server_address.to_string()).or_default().took.add(event.duration);
            }
            SdamEvent::ServerHeartbeatFailed(event) => {
                self.heartbeats.entry(event.server_address.to_string()).or_default().failed += 1;
            }
            _ => {}
        }
        Vec::new()
    }

    pub(super) fn members_of_set(&self) -> Option<BTreeSet<String>> {
        self.seen.is_set.then(|| self.states.keys().cloned().collect())
    }

    pub(super) fn writable(&self) -> BTreeSet<String> {
        let servers = self.seen.servers.iter().filter(|(_, role)| matches!(role, Role::Primary | Role::Writable));
        servers.map(|(host, _)| host.clone()).collect()
    }

    pub(super) fn has_found_somebody(&self) -> bool {
        let mut roles = self.seen.servers.values();
        let is_somebody = |role: &Role| !matches!(role, Role::Unknown | Role::Down);
        self.seen.is_set || roles.clone().any(is_somebody) || roles.len() > 0 && roles.all(|role| *role == Role::Down)
    }

    pub(super) fn readings(&self) -> Vec<Reading> {
        let mut readings = Vec::new();
        for (server, state) in &self.states {
            for each in STATES {
                readings.extend(reading("mongodb_client_server_state", &[server, each], f64::from(u8::from(each == *state))));
            }
        }
        let took: Option<&'static Metric> = metric("mongodb_client_heartbeat_duration_seconds");
        for (server, heartbeats) in &self.heartbeats {
            let value = Value::Histogram(heartbeats.took.value());
            readings.extend(took.map(|metric| Reading { metric, labels: vec![server.clone()], value }));
            #[expect(clippy::cast_precision_loss, reason = "a count")]
            readings.extend(reading("mongodb_client_heartbeat_failures_total", &[server], heartbeats.failed as f64));
        }
        #[expect(clippy::cast_precision_loss, reason = "a count")]
        readings.extend(reading("mongodb_client_failovers_total", &[], self.failovers.found as f64));
        let without = self.failovers.without_primary.as_secs_f64();
        readings.extend(reading("mongodb_client_without_primary_seconds_total", &[], without));
        readings
    }
}

fn seen(topology: &TopologyDescription) -> Seen {
    let kind = topology.topology_type();
    let is_set = matches!(kind, TopologyType::ReplicaSetNoPrimary | TopologyType::ReplicaSetWithPrimary);
    let servers = topology.servers();
    Seen { is_set, servers: servers.iter().map(|(address, server)| (address.to_string(), role(server, is_set))).collect() }
}

fn role(server: &ServerInfo<'_>, is_set: bool) -> Role {
    match server.server_type() {
        ServerType::RsPrimary => Role::Primary,
        ServerType::Standalone | ServerType::Mongos | ServerType::LoadBalancer => Role::Writable,
        // Through a direct connection a member is all there is.
        ServerType::RsSecondary | ServerType::RsArbiter | ServerType::RsOther | ServerType::RsGhost => {
            if is_set {
                Role::Member
            } else {
                Role::Unknown
            }
        }
        ServerType::Unknown => match server.error().map(|error| &*error.kind) {
            // It has answered, as with not being primary any more: what it is is asked at once.
            None | Some(ErrorKind::Command(_) | ErrorKind::Write(_) | ErrorKind::InsertMany(_) | ErrorKind::BulkWrite(_)) => {
                Role::Unknown
            }
            Some(_) => Role::Down,
        },
        _ => Role::Unknown,
    }
}

fn state(server: &ServerInfo<'_>) -> &'static str {
    match server.server_type() {
        ServerType::RsPrimary => "primary",
        ServerType::RsSecondary => "secondary",
        ServerType::RsArbiter => "arbiter",
        ServerType::Standalone => "standalone",
        ServerType::Mongos => "router",
        ServerType::LoadBalancer => "load_balancer",
        ServerType::Unknown => "unknown",
        _ => "other",
    }
}

const STATES: [&str; 8] = ["primary", "secondary", "arbiter", "standalone", "router", "load_balancer", "other", "unknown"];
