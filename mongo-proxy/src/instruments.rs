//! The metrics of a proxy.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use mongo_core::metrics::{Counter, Gauge, MetricsSink};

use crate::{session::Ended, wire::Malformed};

#[derive(Debug)]
pub(crate) struct Instruments {
    connections: Mutex<Arc<dyn Gauge>>,
    pub(crate) turned_away: Arc<dyn Counter>,
    closed: Arc<dyn Counter>,
    client_failed: Arc<dyn Counter>,
    server_failed: Arc<dyn Counter>,
    stopped: Arc<dyn Counter>,
    malformed: [Arc<dyn Counter>; Malformed::ALL.len()],
}

impl Instruments {
    pub(crate) fn new(sink: &dyn MetricsSink) -> Self {
        let outcome = |outcome: &str| {
            sink.counter("mongo_proxy_connections_total", "Connections that ended, by how.", &[("outcome", outcome)])
        };
        let malformed = |malformed: Malformed| {
            let help = "What was sent and is no message, by why.";
            sink.counter("mongo_proxy_malformed_total", help, &[("reason", malformed.as_str())])
        };
        Self {
            connections: Mutex::new(sink.gauge("mongo_proxy_connections", "Connections of clients.", &[])),
            turned_away: outcome("turned_away"),
            closed: outcome("closed"),
            client_failed: outcome("client_failed"),
            server_failed: outcome("server_failed"),
            stopped: outcome("stopped"),
            malformed: Malformed::ALL.map(malformed),
        }
    }

    /// Tells how many there are. One after the other, so that what is told last is what is so.
    pub(crate) fn connections(&self, number: &AtomicUsize) {
        let gauge = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        gauge.set(number.load(Relaxed) as f64);
    }

    pub(crate) fn ended(&self, ended: &Ended) {
        let counter = match ended {
            Ended::Closed => &self.closed,
            Ended::Client(_) => &self.client_failed,
            Ended::Server(_) | Ended::WrongReply => &self.server_failed,
            Ended::Stopped => &self.stopped,
            Ended::Malformed(malformed) => {
                if let Some((_, counter)) = Malformed::ALL.iter().zip(&self.malformed).find(|(known, _)| *known == malformed) {
                    counter.add(1);
                }
                &self.client_failed
            }
        };
        counter.add(1);
    }
}
