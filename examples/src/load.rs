//! What a monitor sees of a server's load, for a workload manager.

use std::{sync::Arc, time::Duration};

use mongo_monitor::{Monitor, View};
use mongo_workload::{Load, LoadSignal, Tickets};

/// Connects a manager to a monitor: `ManagerSettings::default().with_load_signal(Arc::new(load_signal(Arc::clone(&monitor))))`.
///
/// It is known as long as the monitor's readings are fresh: no more than three of its intervals old.
pub fn load_signal(monitor: Arc<Monitor>) -> impl LoadSignal {
    move || load_of(&monitor.view())
}

/// The load of whoever takes writes.
fn load_of(view: &View) -> Option<Load> {
    let primary = view.primary()?;
    let number = |name, labels: &[&str]| primary.number(name, labels);
    let tickets = |op, kind| {
        let out = number("mongodb_tickets", &[op, "out"])?;
        // Before 7.0 nobody counts who waits for a ticket; who waits for a lock may wait for one.
        let waiting =
            number("mongodb_ticket_queue_length", &[op, "normal"]).or_else(|| number("mongodb_global_lock_queue", &[kind]))?;
        Some(Tickets::new(whole(out), whole(waiting)))
    };
    let mut load = Load::default();
    load.read_tickets = tickets("read", "readers")?;
    load.write_tickets = tickets("write", "writers")?;
    let cache = |what| number("mongodb_cache_bytes", &[what]);
    if let (Some(dirty), Some(most)) = (cache("dirty"), cache("max"))
        && most > 0.0
    {
        load.dirty_cache = dirty / most;
    }
    // Of a member that is late on purpose only what it is beyond that.
    let lags = primary.readings.iter().filter(|reading| reading.metric.name == "mongodb_replica_lag_beyond_delay_seconds");
    load.lag = Duration::try_from_secs_f64(lags.map(|reading| reading.as_number()).fold(0.0, f64::max)).unwrap_or_default();
    Some(load)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
fn whole(number: f64) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests {
    use mongo_core::ConnectOptions;
    use mongo_monitor::MonitorSettings;

    use super::*;
    use crate::Host;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_monitor_reads_is_the_load_of_a_manager() {
        let host = Host::embedded(0.25).await.unwrap();
        let options = ConnectOptions::from_uri(host.uri(None)).unwrap();
        let monitor = Arc::new(Monitor::start(options, MonitorSettings::default()).await.unwrap());
        let signal = load_signal(Arc::clone(&monitor));
        let written = host.deployment.database("shop").collection("orders");
        // Until it is seen that something was written.
        let known = async {
            loop {
                written.insert_one(mongo_core::bson::doc! { "text": "x".repeat(100_000) }).await.unwrap();
                monitor.sampled().await;
                if let Some(load) = signal.load().filter(|load| load.dirty_cache > 0.0) {
                    break load;
                }
            }
        };
        let load = tokio::time::timeout(Duration::from_secs(60), known).await.expect("it never knows");
        assert!(load.dirty_cache < 0.9 && load.lag < Duration::from_secs(60), "{load:?}");
        assert_eq!((load.read_tickets.waiting, load.write_tickets.waiting), (0, 0));
    }
}
