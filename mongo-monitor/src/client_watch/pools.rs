//! A client's pools of connections, one for each server.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use mongo_core::mongodb::{
    event::cmap::{CmapEvent, ConnectionCheckoutFailedReason},
    options::ServerAddress,
};

use super::distribution::Distribution;
use crate::{
    reading::{Reading, Value, reading},
    table::metric,
};

#[derive(Debug, Default)]
pub(super) struct Pools(BTreeMap<String, Pool>);

#[derive(Debug, Default)]
struct Pool {
    /// Those that are ready.
    ready: HashSet<u32>,
    /// Those that somebody has, and since when.
    in_use: HashMap<u32, Duration>,
    waiting: u64,
    timeouts: u64,
    cleared: u64,
    create_time: Distribution,
    wait_time: Distribution,
    use_time: Distribution,
}

impl Pools {
    pub(super) fn take(&mut self, event: &CmapEvent, now: Duration) {
        match event {
            CmapEvent::ConnectionReady(event) => {
                let pool = self.of(&event.address);
                pool.ready.insert(event.connection_id);
                pool.create_time.add(event.duration);
            }
            CmapEvent::ConnectionClosed(event) => {
                let pool = self.of(&event.address);
                pool.ready.remove(&event.connection_id);
                pool.in_use.remove(&event.connection_id);
            }
            CmapEvent::ConnectionCheckoutStarted(event) => self.of(&event.address).waiting += 1,
            CmapEvent::ConnectionCheckoutFailed(event) => {
                let pool = self.of(&event.address);
                pool.waiting = pool.waiting.saturating_sub(1);
                pool.timeouts += u64::from(event.reason == ConnectionCheckoutFailedReason::Timeout);
                pool.wait_time.add(event.duration);
            }
            CmapEvent::ConnectionCheckedOut(event) => {
                let pool = self.of(&event.address);
                pool.waiting = pool.waiting.saturating_sub(1);
                pool.in_use.insert(event.connection_id, now);
                pool.wait_time.add(event.duration);
            }
            CmapEvent::ConnectionCheckedIn(event) => {
                let pool = self.of(&event.address);
                if let Some(since) = pool.in_use.remove(&event.connection_id) {
                    pool.use_time.add(now.saturating_sub(since));
                }
            }
            CmapEvent::PoolCleared(event) => self.of(&event.address).cleared += 1,
            CmapEvent::PoolClosed(event) => drop(self.0.remove(&event.address.to_string())),
            _ => {}
        }
    }

    fn of(&mut self, server: &ServerAddress) -> &mut Pool {
        self.0.entry(server.to_string()).or_default()
    }

    pub(super) fn readings(&self) -> Vec<Reading> {
        let mut readings = Vec::new();
        for (server, pool) in &self.0 {
            let (used, idle) = (pool.in_use.len(), pool.ready.len().saturating_sub(pool.in_use.len()));
            // Whoever waits is given what is idle at once: those who seem to wait have gone away.
            let waiting = if idle > 0 { 0 } else { pool.waiting };
            #[expect(clippy::cast_precision_loss, reason = "counts")]
            let numbers = [
                reading("db_client_connection_count", &[server, "used"], used as f64),
                reading("db_client_connection_count", &[server, "idle"], idle as f64),
                reading("db_client_connection_pending_requests", &[server], waiting as f64),
                reading("db_client_connection_timeouts_total", &[server], pool.timeouts as f64),
                reading("mongodb_client_pool_cleared_total", &[server], pool.cleared as f64),
            ];
            readings.extend(numbers.into_iter().flatten());
            for (name, took) in [
                ("db_client_connection_create_time_seconds", &pool.create_time),
                ("db_client_connection_wait_time_seconds", &pool.wait_time),
                ("db_client_connection_use_time_seconds", &pool.use_time),
            ] {
                let value = Value::Histogram(took.value());
                readings.extend(metric(name).map(|metric| Reading { metric, labels: vec![server.clone()], value }));
            }
        }
        readings
    }
}
